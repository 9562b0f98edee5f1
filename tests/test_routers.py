"""Routers: the fold is exact, the text alone decides, and a saved router is the same router."""

from pathlib import Path

import pytest
import torch

from composer.zoo import Checkpoint
from routers import ROUTERS, Candidate
from routers.encoder import Encoder, features_by_layer
from routers.prompt import gates, leave_one_out

MATH = ("Tom has 3 apples and buys 4 more. How many has he?", "A book costs $5. What do 7 books cost?",
        "There are 12 eggs in a box. How many are in 3 boxes?", "Ann walks 2 miles a day. How far in 9 days?",
        "A tank holds 40 liters and loses 8. How many are left?")  # fmt: skip
CODE = ("def add(a, b):\n    return a + b", "for i in range(10):\n    print(i)", "import os\nprint(os.getcwd())",
        "class Stack:\n    def push(self, x):", "Write a function to sort a list.\ndef sort_list(x):")  # fmt: skip


def test_the_fold_is_standardisation_then_direction() -> None:
    torch.manual_seed(0)
    features = torch.randn(12, 5) * torch.tensor([1.0, 100.0, 0.01, 1.0, 3.0]) + 7
    labels = torch.arange(12) % 3
    weight, bias = gates(features, labels, 3)
    standard = (features - features.mean(0)) / features.std(0, correction=0)
    for expert in range(3):
        own = labels == expert
        direction = standard[own].mean(0) - standard[~own].mean(0)
        expected = standard @ (direction / direction.norm())
        assert torch.allclose(features @ weight[expert] + bias[expert], expected, atol=1e-3)


def test_a_constant_dimension_does_no_harm() -> None:
    features = torch.cat([torch.eye(4), torch.full((4, 1), 1e6)], dim=1)
    weight, bias = gates(features, torch.tensor([0, 0, 1, 1]), 2)
    assert torch.isfinite(weight).all()
    assert torch.isfinite(bias).all()


def test_leave_one_out_passes_over_single_examples() -> None:
    pairs = leave_one_out(torch.randn(3, 4), torch.tensor([0, 1, 1]), 2)
    assert [own for own, _ in pairs] == [1, 1]


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_the_truncated_encoder_gives_the_whole_models_states(quick: dict[str, Checkpoint], layers: int) -> None:
    for name in ("stories", "script"):
        path = quick[name].path
        expected = features_by_layer(path, [MATH[0]])[layers, 0]
        assert torch.allclose(Encoder(path, layers)(MATH[0]), expected, atol=1e-5)


@pytest.fixture(scope="module")
def candidates(quick: dict[str, Checkpoint]) -> list[Candidate]:
    return [
        Candidate(id=name, path=quick[name].path, parameters=quick[name].parameters, examples=examples)
        for name, examples in (("stories-math", MATH), ("script", CODE))
    ]


def test_a_prompt_router_routes_and_loads_as_it_was_saved(candidates: list[Candidate], tmp_path: Path) -> None:
    kind = ROUTERS.get("prompt")
    manifest = kind.build(candidates, tmp_path, encoder="auto", layer="auto", margin=0.0, fallback="script")
    assert manifest.experts == ("stories-math", "script")
    assert manifest.leave_one_out is not None
    assert manifest.leave_one_out > 0.7
    encoder = next(one.path for one in candidates if one.id == manifest.encoder)
    first, second = (kind.load(manifest, tmp_path, encoder) for _ in range(2))
    new = {
        "Sue has 5 pens and gives away 2. How many are left?": "stories-math",
        "while x > 0:\n    x = x - 1": "script",
    }
    for text, expert in new.items():
        decision = first.route(text)
        assert decision.expert == expert
        assert decision == second.route(text)
        assert decision.margin >= 0
    assert first.route("").expert in manifest.experts


def test_an_unclear_prompt_goes_to_the_fallback(candidates: list[Candidate], tmp_path: Path) -> None:
    kind = ROUTERS.get("prompt")
    manifest = kind.build(candidates, tmp_path, encoder="script", layer=1, margin=1e9, fallback="script")
    assert (manifest.encoder, manifest.layer) == ("script", 1)
    decision = kind.load(manifest, tmp_path, candidates[1].path).route(MATH[0])
    assert decision.abstained
    assert decision.expert == "script"


def test_examples_that_cannot_route_are_reported(quick: dict[str, Checkpoint], tmp_path: Path) -> None:
    same = ("red", "blue", "green")
    candidates = [
        Candidate(id=name, path=quick[name].path, parameters=quick[name].parameters, examples=same)
        for name in ("stories-math", "script")
    ]
    manifest = ROUTERS.get("prompt").build(
        candidates, tmp_path, encoder="script", layer=1, margin=0.0, fallback="script"
    )
    text = " ".join(manifest.warnings)
    assert "single words" in text
    assert "give 5 to 10" in text
    assert "find their own expert when left out" in text
