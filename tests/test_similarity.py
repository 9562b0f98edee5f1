"""Similarity: the streamed numbers are the direct ones, and every model ends in exactly one cluster."""

from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from composer.clustering import cluster
from composer.similarity import SimilarityMatrix, compare, streamed
from composer.zoo import Checkpoint, Zoo


def direct(first: Checkpoint, second: Checkpoint) -> float:
    """Cosines of whole matrices in float64, averaged."""
    a, b = (load_file(Path(one.path) / "model.safetensors") for one in (first, second))
    cosines = [
        torch.nn.functional.cosine_similarity(a[name].double().flatten(), b[name].double().flatten(), dim=0)
        for name in a
        if a[name].ndim == 2 and "embed" not in name and "lm_head" not in name
    ]
    return float(torch.stack(cosines).mean())


@pytest.mark.parametrize("block", [64, 5000, 1 << 20])
def test_streamed_equals_direct(quick: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(streamed, "BLOCK_ELEMENTS", block)
    names = ("stories", "stories-math", "stories-web")
    matrix = compare(Zoo(members=tuple(quick[name] for name in names)))
    for first, second in product(names, names):
        assert matrix.between(first, second) == pytest.approx(direct(quick[first], quick[second]), abs=1e-9)
        assert matrix.between(first, second) == matrix.between(second, first)
    assert matrix.between("stories", "stories") == 1.0


def test_models_of_other_families_are_gated_with_the_reason(quick: dict[str, Checkpoint]) -> None:
    family = {name: one for name, one in quick.items() if not name.startswith("stories")}
    other = next(iter(family.values()))
    matrix = compare(Zoo(members=(quick["stories"], other)))
    assert matrix.between("stories", other.id) is None
    assert "another architecture (LlamaForCausalLM, Qwen2ForCausalLM)" in (matrix.gate("stories", other.id) or "")
    assert matrix.gate(other.id, "stories") == matrix.gate("stories", other.id)


def test_the_quickstart_zoo_has_two_families(quick: dict[str, Checkpoint]) -> None:
    clusters = cluster(compare(Zoo(members=tuple(quick.values()))), 0.95)
    families = [sorted(one.members) for one in clusters]
    assert sorted(map(tuple, families)) == sorted(
        [
            tuple(sorted(name for name in quick if name.startswith("stories"))),
            tuple(sorted(name for name in quick if not name.startswith("stories"))),
        ]
    )


@st.composite
def matrices(draw: st.DrawFn) -> SimilarityMatrix:
    count = draw(st.integers(1, 8))
    ids = tuple(f"m{i}" for i in range(count))
    rows: list[list[float | None]] = [[1.0] * count for _ in ids]
    gates = {}
    for i in range(count):
        for j in range(i):
            value = draw(st.none() | st.floats(-1, 1))
            rows[i][j] = rows[j][i] = value
            if value is None:
                gates[f"{ids[j]}|{ids[i]}"] = "another shape"
    return SimilarityMatrix(ids=ids, values=tuple(map(tuple, rows)), gates=gates)


@settings(max_examples=200, deadline=None)
@given(matrices(), st.floats(-1, 1))
def test_every_model_is_in_exactly_one_cluster(matrix: SimilarityMatrix, threshold: float) -> None:
    clusters = cluster(matrix, threshold)
    assert sorted(name for one in clusters for name in one.members) == sorted(matrix.ids)
    home = {name: one.id for one in clusters for name in one.members}
    for a, b in product(matrix.ids, matrix.ids):
        value = matrix.between(a, b)
        if a != b and value is not None and value >= threshold:
            assert home[a] == home[b]
    for one in clusters:
        assert one.representative in one.members
        assert one.reason


def test_a_loner_is_told_its_nearest_neighbour() -> None:
    matrix = SimilarityMatrix(ids=("a", "b"), values=((1.0, 0.5), (0.5, 1.0)), gates={})
    first, second = cluster(matrix, 0.95)
    assert first.members == ("a",)
    assert "its nearest neighbour, b, has weight cosine 0.5000, below the threshold 0.95" in first.reason
    assert second.members == ("b",)
