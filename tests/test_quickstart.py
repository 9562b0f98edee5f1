"""The embedded zoo: small, licensed, loadable, and with splits that never meet."""

import json
import re
from itertools import combinations
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from composer.recipe import load_recipe
from tests.conftest import MODELS, QUICKSTART, ROOT

DOMAINS = sorted(path.stem.removeprefix("quick_") for path in (QUICKSTART / "tasks").glob("*.yaml"))
SPLITS = ("train", "proxy", "heldout")


def rows(domain: str, split: str) -> list[dict[str, object]]:
    lines = (QUICKSTART / "tasks" / "data" / f"{domain}_{split}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_it_is_small_enough_to_ship() -> None:
    size = sum(
        path.stat().st_size for path in QUICKSTART.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    )
    assert size <= 12_000_000


@pytest.mark.parametrize("path", sorted(MODELS.iterdir()), ids=lambda path: path.name)
def test_every_model_loads_speaks_and_states_its_licence(path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    with torch.inference_mode():
        assert torch.isfinite(model(ids).logits).all()
    assert re.search(r"^license: \S+$", (path / "README.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("domain", DOMAINS)
def test_splits_share_no_passage_and_no_text(domain: str) -> None:
    for one, two in combinations(SPLITS, 2):
        for key in ("source", "context"):
            first, second = ({str(row[key]) for row in rows(domain, split)} for split in (one, two))
            assert not first & second, f"{one} and {two} share a {key}"


@pytest.mark.parametrize("domain", DOMAINS)
def test_items_are_well_formed_and_the_answer_is_anywhere(domain: str) -> None:
    for split in SPLITS:
        answers = [row["answer"] for row in rows(domain, split)]
        assert set(answers) == {0, 1, 2, 3}
        for row in rows(domain, split):
            choices = row["choices"]
            assert isinstance(choices, list)
            assert len(set(choices)) == 4


def test_the_router_has_not_seen_proxy_or_held_out_items() -> None:
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml")
    examples = {text for model in recipe.zoo.models for text in model.examples}
    assert examples
    for domain in DOMAINS:
        for split in ("proxy", "heldout"):
            assert not examples & {str(row["context"]) for row in rows(domain, split)}
