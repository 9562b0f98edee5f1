"""Held-out items are not read before the end: a whole run is watched up to the stage that may read them."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from langgraph.checkpoint.memory import InMemorySaver
from lm_eval.api.task import ConfigurableTask
from transformers import PreTrainedTokenizerBase

from composer.artefacts import Store
from composer.evaluation.in_process import score_checkpoint
from composer.evaluation.tasks import load_split
from composer.recipe import load_recipe
from composer.runs import Run
from composer.zoo import inspect_checkpoint
from graphs.compose import build
from graphs.state import ComposeContext
from tests.conftest import MODELS, QUICKSTART

TASKS = ["quick_math", "quick_science"]
RECIPE = f"""\
name: watched
zoo:
  base: {MODELS}/stories
  models:
    - {{id: math, model: {MODELS}/stories-math, examples: ["Tom has 3 apples.", "How many are left?"]}}
    - {{id: science, model: {MODELS}/stories-science, examples: ["Why is the sky blue?", "What is a cell?"]}}
    - {{id: code, model: {MODELS}/script-code, examples: ["def add(a, b):", "import os"]}}
cluster: {{threshold: 0.95}}
serve: {{engine: transformers, port: 0}}
probes: {{limit: 4}}
evaluate: {{include: {QUICKSTART}/tasks, tasks: {TASKS}, proxy_limit: 12, held_out_limit: 12, batch_size: 48}}
"""


class Watch:
    """Everything that goes through a door to a model: documents made into requests, texts tokenised, HTTP requests."""

    def __init__(self) -> None:
        self.documents: list[dict[str, Any]] = []
        self.texts: list[str] = []


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    seen = Watch()

    def listen(owner: type, name: str, note: Any) -> None:
        real = getattr(owner, name)

        def heard(self: Any, *arguments: Any, **options: Any) -> Any:
            note(*arguments, *options.values())
            return real(self, *arguments, **options)

        monkeypatch.setattr(owner, name, heard)

    def text(*arguments: Any) -> None:
        seen.texts.append(json.dumps([one for one in arguments if isinstance(one, (str, list, tuple))], default=str))

    listen(ConfigurableTask, "construct_requests", lambda document, *_: seen.documents.append(document))
    for name in ("__call__", "encode"):
        listen(PreTrainedTokenizerBase, name, text)
    for client in (httpx.Client, httpx.AsyncClient):
        listen(client, "send", lambda request, *_: seen.texts.append(request.content.decode(errors="replace")))
    yield seen


def rows(part: str) -> list[dict[str, Any]]:
    files = [QUICKSTART / "tasks" / "data" / f"{task.removeprefix('quick_')}_{part}.jsonl" for task in TASKS]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def written(root: Path) -> str:
    """All that a run and its store hold as text, and the log of trials."""
    texts = [file.read_text() for file in root.rglob("*.json*") if "merged" not in file.parts]
    log = root / "store" / "trials.sqlite"
    if log.is_file():
        with closing(sqlite3.connect(log)) as base:
            texts += [str(row) for row in base.execute("SELECT * FROM trials").fetchall()]
    return "\n".join(texts)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["merge.strategy=coefficient", "mixture.router.kind=linear", "mixture.router.learn_from=proxy"],
        ["merge.strategy=simmerge"],
        ["merge.strategy=bandit", "merge.bandit.rounds=2", "cluster.signal=logits", "cluster.threshold=0.5"],
    ],
    ids=["search", "predicted", "learnt"],
)
def test_no_stage_before_the_evaluation_shows_a_model_a_held_out_item(
    overrides: list[str], tmp_path: Path, watch: Watch
) -> None:
    recipe = tmp_path / "watched.yaml"
    recipe.write_text(RECIPE)
    loaded = load_recipe(recipe, overrides)
    run = Run.of(loaded, tmp_path / "runs")
    with run.locked():
        run.create(loaded)
        context = ComposeContext(run_path=str(run.path), yes=True)
        graph = build().compile(checkpointer=InMemorySaver(), interrupt_before=["evaluate"])
        config: Any = {"configurable": {"thread_id": "watched"}}
        try:
            graph.invoke({}, config, context=context)
        finally:
            context.session.close()
    assert graph.get_state(config).next == ("evaluate",)
    finished = [one["stage"] for one in run.events() if one["event"] == "finished"]
    assert {"plan", "merge", "mix", "serve"} <= set(finished)

    proxy, held_out = ({json.dumps(row, sort_keys=True) for row in rows(part)} for part in ("proxy", "heldout"))
    hashes = {
        item for items in load_split(TASKS, "held_out", include=f"{QUICKSTART}/tasks").tasks for item in items.hashes
    }
    contexts = {json.loads(row)["context"] for row in held_out} - {json.loads(row)["context"] for row in proxy}
    assert len(contexts) > 300

    def asked() -> set[str]:
        return {json.dumps(document, sort_keys=True) for document in watch.documents} & held_out

    def read() -> set[str]:
        # As they stand in JSON, which is how the watch writes them down.
        return {text for text in contexts if any(json.dumps(text)[1:-1] in one for one in watch.texts)}

    def known() -> set[str]:
        text = written(tmp_path / "runs")
        return {item for item in hashes if item in text}

    assert {json.dumps(document, sort_keys=True) for document in watch.documents} & proxy, "the watch sees proxy items"
    assert not asked()
    assert not read()
    assert not known()

    # The same watch does see what the evaluation would do.
    split = load_split(TASKS, "held_out", include=f"{QUICKSTART}/tasks", limit=3)
    store = Store(tmp_path / "runs" / "store")
    score_checkpoint(inspect_checkpoint("math", MODELS / "stories-math", store), split, store)
    assert len(asked()) == 6
    assert read()
    assert len(known()) == 6
