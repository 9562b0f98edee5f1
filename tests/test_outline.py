"""Prices of zoos that are not here: from the headers of the hub's files, or from what the recipe states."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from composer.recipe import load_recipe
from tests.conftest import MODELS, ROOT, Cli
from tests.hub import Hub

PAPER = sorted((ROOT / "recipes" / "model-glue").glob("*.yaml"))
HUB_ZOOS = [*PAPER, ROOT / "recipes" / "qwen2.5-7b.yaml"]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as one:
        yield one


def written(tmp_path: Path, *models: str) -> str:
    lines = "".join(f"    - {{{one}}}\n" for one in models)
    path = tmp_path / "zoo.yaml"
    path.write_text(f"name: priced\nzoo:\n  models:\n{lines}evaluate: {{tasks: [arc_easy], proxy_limit: 10}}\n")
    return str(path)


def test_headers_on_the_hub_are_enough_for_a_price(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/stories", MODELS / "stories")
    hub.add("org/math", MODELS / "stories-math")
    hub.add("org/script", MODELS / "script-code")
    recipe = written(tmp_path, *(f"id: {one}, model: org/{one}" for one in ("stories", "math", "script")))
    environment = {**os.environ, **hub.environment(tmp_path / "home")}
    command = [sys.executable, "-m", "composer.cli", "plan", recipe, "--json"]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    outline = json.loads(result.stdout)["outline"]
    assert outline["clusters"] == [["stories", "math"], ["script"]]
    assert [one["parameters"] for one in outline["models"]] == [444352, 444352, 493024]
    assert not any(one["declared"] for one in outline["models"])
    assert outline["cost"]["engines"] == 2
    assert not any(one.status == 200 and "safetensors" in one.path and one.sent > 400_000 for one in hub.requests)


def test_without_a_hub_the_stated_sizes_are_enough(cli: Cli, tmp_path: Path) -> None:
    sizes = {"a": 6_738_415_616, "b": 6_738_423_808, "c": 494_000_000}
    stated = written(tmp_path, *(f"id: {one}, model: org/{one}, parameters: {size}" for one, size in sizes.items()))
    result = cli("plan", stated, "--json", HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    outline = json.loads(result.stdout)["outline"]
    assert outline["clusters"] == [["a", "b"], ["c"]]
    assert outline["download_bytes"] == 2 * sum(sizes.values())
    assert "cannot be reached" in outline["unreachable"]
    shown = cli("plan", stated, HF_HUB_OFFLINE="1")
    assert "6,738,415,616" in shown.stdout
    assert "at most: reads 27.9 GB" in shown.stdout
    missing = cli("plan", written(tmp_path, "id: a, model: org/a, parameters: 7000000000", "id: b, model: org/b"))
    assert missing.returncode == 3
    assert "zoo.models.b.parameters" in missing.stderr


@pytest.mark.parametrize("path", HUB_ZOOS, ids=lambda path: path.stem)
def test_recipes_of_zoos_on_the_hub_hold_together(path: Path) -> None:
    recipe = load_recipe(path, [])
    assert all(entry.parameters for entry in recipe.zoo.models)
    head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"model-composer run recipes/{path.relative_to(ROOT / 'recipes')}" in head
    assert all(word in head for word in ("GB of disk", "GB of RAM", "GPU", "hours"))
    if path.stem.startswith("which") and path.stem != "which16":
        assert len(recipe.zoo.models) == int(path.stem.removeprefix("which").split("-")[0])


def test_a_recipe_of_the_paper_is_priced_without_a_hub(cli: Cli) -> None:
    result = cli("plan", str(ROOT / "recipes" / "model-glue" / "which16.yaml"), "--json", HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    outline = json.loads(result.stdout)["outline"]
    assert 180e9 < outline["download_bytes"] < 200e9


def test_tasks_that_run_code_are_known_and_fit_the_sandbox() -> None:
    from lm_eval.tasks import TaskManager

    from composer.evaluation.sandbox import pass_at_1

    folder = ROOT / "recipes" / "model-glue" / "tasks"
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    assert set(manager.all_tasks) == {"boxed_mbpp", "boxed_humaneval"}
    for name in manager.all_tasks:
        text = (folder / f"{name}.yaml").read_text()
        assert f"task: {name}\n" in text
        assert f"!function {pass_at_1.__module__}.{pass_at_1.__name__}" in text
        assert "unsafe_code: true" in text
