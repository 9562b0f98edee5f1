"""Whole models that answer together: an average of distributions, which neither caches nor padding change."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from composer.artefacts import Store
from composer.errors import RecipeError
from composer.mixture.fusion import FusedCache, ModelMixtureForCausalLM, build_fusion, register
from composer.zoo import Checkpoint
from tests.mixtures import GREEDY, TEXTS, TINY, answers, batch_of, close, load, logits, made_of

NAMES = ("stories-math", "stories-science", "stories-law")
Build = Callable[..., ModelMixtureForCausalLM]


@pytest.fixture(scope="module")
def build(quick: dict[str, Checkpoint], tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Build and load a mixture in float32."""
    register()

    def make(
        experts: list[Checkpoint], top_k: int, bias: torch.Tensor | None = None, layers: int = 2
    ) -> ModelMixtureForCausalLM:
        torch.manual_seed(0)
        weight = torch.randn(len(experts), experts[0].hidden_size or 0) * (0.0 if bias is not None else 3.0)
        own = torch.zeros(len(experts)) if bias is None else bias
        directory = tmp_path_factory.mktemp("fusion")
        build_fusion(experts, 0, layers, weight, own, directory, top_k=top_k)
        return load(directory)  # type: ignore[no-any-return]

    return make


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model of another size with the same tokenizer."""
    home = tmp_path_factory.mktemp("other")
    return made_of(LlamaConfig(**TINY), home / "other", Store(home / "store"))


def test_one_expert_answers_as_it_does_alone(build: Build, quick: dict[str, Checkpoint]) -> None:
    batch, alone = batch_of(*TEXTS), load(quick[NAMES[0]].path)
    assert close(logits(build([quick[NAMES[0]]], 1), batch), logits(alone, batch), 1e-5)
    forced = build([quick[name] for name in NAMES], 1, torch.tensor([50.0, 0.0, 0.0]))
    assert close(logits(forced, batch), logits(alone, batch), 1e-5)
    assert torch.equal(answers(forced, batch), answers(alone, batch))


def test_the_result_is_the_average_of_distributions(
    build: Build, quick: dict[str, Checkpoint], other: Checkpoint
) -> None:
    experts, batch = [quick[NAMES[0]], other, quick[NAMES[1]]], batch_of(*TEXTS)
    model = build(experts, 2, torch.tensor([1.0, 0.5, -9.0]))
    shares = torch.tensor([1.0, 0.5]).softmax(0)
    each = [logits(load(one.path), batch) for one in experts[:2]]
    expected = [(shares[0] * a.softmax(-1) + shares[1] * b.softmax(-1)).log() for a, b in zip(*each, strict=True)]
    assert close(logits(model, batch), expected, 1e-4)


@pytest.mark.parametrize("layers", [0, 2, 5])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_cache_padding_and_batch_mates_change_nothing(
    layers: int, top_k: int, build: Build, quick: dict[str, Checkpoint]
) -> None:
    model, batch = build([quick[name] for name in NAMES], top_k, layers=layers), batch_of(*TEXTS)
    options: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True}
    cached = model.generate(**batch.inputs, **options, **GREEDY)
    anew = model.generate(**batch.inputs, **options, **GREEDY, use_cache=False)
    assert isinstance(cached.past_key_values, FusedCache)
    assert torch.equal(cached.sequences, anew.sequences)
    assert close(list(cached.logits), list(anew.logits))
    whole = logits(model, batch)
    for side, more in (("left", 3), ("right", 0), ("right", 4)):
        assert close(logits(model, batch_of(*TEXTS, side=side, more=more)), whole)
    assert close(logits(model, batch_of(*TEXTS[::-1])), whole[::-1])
    assert close([logits(model, batch_of(text))[0] for text in TEXTS], whole)


def test_texts_go_different_ways_and_beams_keep_theirs(build: Build, quick: dict[str, Checkpoint]) -> None:
    model, batch = build([quick[name] for name in NAMES], 1), batch_of(*TEXTS)
    with torch.inference_mode():
        shares = model(**batch.inputs).past_key_values.shares
    assert len({tuple(row) for row in shares.tolist()}) > 1
    for number, text in enumerate(TEXTS):
        beams = answers(model, batch_of(text), num_beams=3)
        assert torch.equal(answers(model, batch, num_beams=3)[number], beams[0])


def test_it_is_saved_and_loaded_as_it_is(
    build: Build, quick: dict[str, Checkpoint], other: Checkpoint, tmp_path: Path
) -> None:
    model, batch = build([quick[NAMES[0]], other], 2), batch_of(*TEXTS)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(logits(model, batch), logits(again, batch), strict=True))
    half = load(tmp_path / "again", dtype=torch.bfloat16)
    assert half.gate.weight.dtype == torch.float32
    assert answers(half, batch).shape == (4, 6)


def test_experts_without_a_common_tokenizer_are_refused(quick: dict[str, Checkpoint], tmp_path: Path) -> None:
    experts, weight = [quick["stories-math"], quick["script-code"]], torch.zeros(2, 64)
    with pytest.raises(
        RecipeError, match=r"'script-code' does not go .* 'stories-math': another tokenizer; .*top_k: 1"
    ):
        build_fusion(experts, 0, 1, weight, torch.zeros(2), tmp_path, top_k=2)
    with pytest.raises(RecipeError, match=r"mixture\.top_k: 3, but there are only 2 experts"):
        build_fusion([quick["stories-math"]] * 2, 0, 1, weight, torch.zeros(2), tmp_path, top_k=3)
