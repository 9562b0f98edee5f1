"""Scoring through the endpoint task by task: what was done before a kill is not done again."""

from pathlib import Path
from typing import Any

import pytest

from composer.artefacts import Store
from composer.evaluation import endpoint as door
from composer.evaluation.served import score_endpoint
from composer.evaluation.tasks import Split, load_split
from composer.progress import Step
from composer.serving.server import Server
from composer.serving.settings import ServeSection
from composer.zoo import Checkpoint
from tests.conftest import QUICKSTART
from tests.test_sandbox import CODE_TASKS, confined
from tests.test_serving import composite_of


@pytest.mark.slow
def test_a_task_that_was_scored_before_a_kill_is_not_asked_again(
    quick: dict[str, Checkpoint], shared_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = load_split(["quick_math", "quick_science"], "held_out", include=str(QUICKSTART / "tasks"), limit=6).tasks
    if confined():
        tasks += load_split(["tiny_code"], "held_out", include=str(CODE_TASKS), sandbox=True).tasks
    split, store = Split("held_out", tasks), Store(tmp_path / "store")
    asked: list[tuple[str, str]] = []
    post = door._post

    def recorded(client: Any, path: str, body: dict[str, Any]) -> dict[str, Any]:
        asked.append((path, str(body)))
        return post(client, path, body)

    monkeypatch.setattr(door, "_post", recorded)
    first, last = ([str(one) for one in items.task.eval_docs["context"][:200]] for items in tasks[:2])
    steps: list[Step] = []

    def killed(step: Step) -> None:
        steps.append(step)
        if step.message == "quick_science":
            raise KeyboardInterrupt

    directory = composite_of(quick, shared_store, "stories-math")
    section = ServeSection(port=0, engine="transformers")
    with Server(directory, section, tmp_path / "logs") as server:

        def score(store: Store = store, **options: Any) -> Any:
            asked.clear()
            chosen = {"endpoint": server.endpoint, "serving": section, **options}
            return score_endpoint(chosen.pop("endpoint"), directory, split, store, **chosen)

        with pytest.raises(KeyboardInterrupt):
            score(progress=killed)
        assert any(text in body for _, body in asked for text in first)
        assert not any(text in body for _, body in asked for text in last)
        assert {(step.done, step.total) for step in steps if step.message in ("quick_math", "quick_science")} == {
            (0, len(tasks)),
            (1, len(tasks)),
        }
        carried_on = score()
        assert asked
        assert not any(text in body for _, body in asked for text in first), "it was scored before"
        assert any(text in body for _, body in asked for text in last)
        again = score()
        assert asked == [], "all is known: not a single request"
        assert again == carried_on
        afresh = score(Store(tmp_path / "other"))
        assert afresh.scores == carried_on.scores
        assert (
            afresh.routing == carried_on.routing == {items.name: {"stories-math": len(items.hashes)} for items in tasks}
        )
        other = server.endpoint.model_copy(update={"engines": {"stories-math": "another"}})
        score(endpoint=other)
        assert asked, "what another engine would score is not known"
        score(serving=section.model_copy(update={"dtype": "float16"}))
        assert asked
        score(serving=section.model_copy(update={"port": 1234}))
        assert asked == [], "the port does not matter"
