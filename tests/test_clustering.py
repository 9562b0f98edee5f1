"""Clustering: every model in exactly one cluster, none with one it may not be merged with, and a reason for each."""

import json
from itertools import combinations, pairwise, product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from composer.artefacts import Store
from composer.clustering import ClusterSection, cluster, joins, suggest
from composer.similarity import SimilarityMatrix, compare
from composer.zoo import Checkpoint, Zoo, inspect_checkpoint
from tests.checkpoints import add_tokens, write_checkpoint
from tests.conftest import MODELS, Cli

METHODS = ("components", "leader", "agglomerative")


def matrix_of(rows: list[list[float | None]], gates: dict[str, str] | None = None) -> SimilarityMatrix:
    ids = tuple("abcdefghijkl"[: len(rows)])
    full = [[1.0 if i == j else rows[max(i, j)][min(i, j)] for j in range(len(rows))] for i in range(len(rows))]
    return SimilarityMatrix(ids=ids, values=tuple(map(tuple, full)), gates=gates or {})


def groups(matrix: SimilarityMatrix, method: str, threshold: float = 0.95) -> list[str]:
    section = ClusterSection(method=method, threshold=threshold)  # type: ignore[arg-type]
    return ["".join(one.members) for one in cluster(matrix, section)]


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


@settings(max_examples=300, deadline=None)
@given(matrices(), st.floats(-1, 1), st.sampled_from(METHODS))
def test_every_model_is_in_exactly_one_cluster(matrix: SimilarityMatrix, threshold: float, method: str) -> None:
    section = ClusterSection(method=method, threshold=threshold)  # type: ignore[arg-type]
    clusters = cluster(matrix, section)
    assert sorted(name for one in clusters for name in one.members) == sorted(matrix.ids)
    for one in clusters:
        assert one.representative in one.members
        assert one.reason
        for a, b in combinations(one.members, 2):
            assert matrix.gate(a, b) is None, "what may not be merged never shares a cluster"
    if method == "components" and not matrix.gates:
        home = {name: one.id for one in clusters for name in one.members}
        for a, b in product(matrix.ids, matrix.ids):
            value = matrix.between(a, b)
            if value is not None and value >= threshold:
                assert home[a] == home[b]


@settings(max_examples=100, deadline=None)
@given(matrices(), st.sampled_from(METHODS))
def test_similarities_at_which_groups_join_fall(matrix: SimilarityMatrix, method: str) -> None:
    levels = [one.similarity for one in joins(matrix, ClusterSection(method=method))]  # type: ignore[arg-type]
    assert all(a >= b - 1e-12 for a, b in pairwise(levels))


def test_a_chain_tells_the_methods_apart() -> None:
    """a-b and b-c are close, a-c are not."""
    chain = matrix_of([[], [0.97], [0.90, 0.97]])
    assert groups(chain, "components") == ["abc"]
    assert groups(chain, "leader") == ["ab", "c"]
    assert groups(chain, "agglomerative") == ["ab", "c"], "the mean of .97 and .90 is below"
    assert groups(chain, "agglomerative", 0.93) == ["abc"]


def test_the_widest_gap_is_suggested() -> None:
    two = matrix_of([[], [0.99], [0.3, 0.32], [0.31, 0.3, 0.98]])
    found = suggest(two, ClusterSection())
    assert (found.above, found.below, found.clusters) == (0.98, 0.32, 2)
    assert found.threshold == pytest.approx(0.65)
    assert found.in_words() == (
        "the widest gap lies between 0.980000 and 0.320000: cluster.threshold=0.65 gives 2 clusters"
    )
    one = suggest(matrix_of([[], [0.999], [0.998, 0.999]]), ClusterSection())
    assert one.clusters == 1
    apart = suggest(matrix_of([[], [0.02], [0.01, 0.05]]), ClusterSection())
    assert apart.clusters == 3, "unrelated models stay alone"
    nothing = suggest(matrix_of([[], [None]], {"a|b": "another shape"}), ClusterSection())
    assert nothing.threshold is None
    assert "no threshold to suggest" in nothing.in_words()


def test_a_loner_is_told_why() -> None:
    first, second = cluster(matrix_of([[], [0.5]]), ClusterSection())
    assert first.members == ("a",)
    assert first.reason == "its nearest neighbour, b, has weight cosine 0.5000, below the threshold 0.95"
    assert second.members == ("b",)
    (one,) = cluster(matrix_of([[]]), ClusterSection())
    assert one.reason == "the only model of the zoo"
    undefined = matrix_of([[], [None]]).model_copy(update={"undefined": {"a|b": "a is the base"}})
    assert cluster(undefined, ClusterSection())[0].reason == "there is no weight cosine: a is the base"


def test_the_base_represents_its_cluster(quick: dict[str, Checkpoint], shared_store: Store) -> None:
    matrix = matrix_of([[], [0.99], [0.98, 0.97]])
    assert cluster(matrix, ClusterSection())[0].representative == "a", "the medoid"
    members = tuple(quick[name] for name in ("stories-math", "stories-web", "script-code"))
    zoo = Zoo(members=members, base=quick["stories"].renamed("base"))
    family, other = cluster(compare(zoo, shared_store), ClusterSection())
    assert family.representative == "base", "a member or not"
    assert other.representative == "script-code"


def test_the_quickstart_zoo_has_two_families(quick: dict[str, Checkpoint], shared_store: Store) -> None:
    found = cluster(compare(Zoo(members=tuple(quick.values())), shared_store), ClusterSection())
    expected = [{name for name in quick if name.startswith(family)} for family in ("script", "stories")]
    assert sorted(map(sorted, (one.members for one in found))) == sorted(map(sorted, expected))


FAMILIES = 5


@pytest.fixture(scope="module")
def forty(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Checkpoint], dict[str, str], Store]:
    """Forty models, in an order that mixes them: five families of six, one with added tokens, and ten that fit nowhere.

    Families 0 and 1 are of one shape and different seeds; the others of shapes of their own.
    """
    root = tmp_path_factory.mktemp("forty")
    store = Store(root / "store")
    generator = torch.Generator().manual_seed(0)
    stories = {n: t.float() for n, t in load_file(MODELS / "stories" / "model.safetensors").items()}

    def drawn(width: int) -> dict[str, torch.Tensor]:
        shapes = {name: [width if size == 64 else size for size in tensor.shape] for name, tensor in stories.items()}
        return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    def write(name: str, tensors: dict[str, torch.Tensor], **config: object) -> Path:
        return write_checkpoint(root / name, {n: t.to(torch.bfloat16) for n, t in tensors.items()}, **config)

    home: dict[str, str] = {}
    paths: dict[str, Path] = {}
    for family in range(FAMILIES):
        base = drawn(64 if family < 2 else 64 + 8 * family)
        for number in range(6):
            name = f"f{family}-{number}"
            scale = 0.0 if number == 0 else 0.1
            tuned = {n: t + scale * torch.randn(t.shape, generator=generator) for n, t in base.items()}
            if (family, number) == (1, 3):
                row = torch.randn(1, tuned["model.embed_tokens.weight"].shape[1], generator=generator)
                tuned["model.embed_tokens.weight"] = torch.cat([tuned["model.embed_tokens.weight"], row])
            paths[name], home[name] = (
                write(name, tuned, hidden_size=64 if family < 2 else 64 + 8 * family),
                f"f{family}",
            )
        if family == 1:
            add_tokens(paths["f1-3"], "<extra>")
    for number in range(3):  # of the shape of families 0 and 1, but unrelated to them
        paths[f"stranger-{number}"] = write(f"stranger-{number}", drawn(64))
    for number in range(3):  # a family's weights with other settings
        base = {n: t.float() for n, t in load_file(paths["f0-0"] / "model.safetensors").items()}
        paths[f"turned-{number}"] = write(f"turned-{number}", base, rope_theta=5e4 * (number + 1), rope_parameters=None)
    for number, name in enumerate(("script-code", "script-play")):
        paths[f"script-{number}"], home[f"script-{number}"] = MODELS / name, "script"
    odd = drawn(64)
    odd["model.layers.1.mlp.up_proj.weight"] = odd["model.layers.1.mlp.up_proj.weight"][:100].contiguous()
    paths["odd"] = write("odd", odd)
    paths["narrow"] = write("narrow", drawn(48), hidden_size=48)
    order = sorted(paths, key=lambda name: (name[-1], name))
    assert len(order) == 40
    models = [inspect_checkpoint(name, paths[name], store) for name in order]
    return models, {name: home.get(name, name) for name in order}, store


@pytest.mark.parametrize("method", METHODS)
def test_forty_models_end_where_they_belong(forty: tuple[list[Checkpoint], dict[str, str], Store], method: str) -> None:
    models, home, store = forty
    matrix = compare(Zoo(members=tuple(models)), store)
    clusters = cluster(matrix, ClusterSection(method=method, threshold=0.9))  # type: ignore[arg-type]
    found = sorted(sorted(one.members) for one in clusters)
    expected: dict[str, list[str]] = {}
    for name, family in home.items():
        expected.setdefault(family, []).append(name)
    assert found == sorted(map(sorted, expected.values()))
    assert sum(len(one.members) for one in clusters) == 40
    by_member = {name: one for one in clusters for name in one.members}
    assert by_member["f1-0"].notes == ("f1-0, f1-1, f1-2 and 3 more: vocabularies differ by added tokens (<extra>)",)
    assert "below the threshold 0.9" in by_member["stranger-0"].reason
    assert "another rope" in by_member["turned-1"].reason
    assert "another hidden size (48, 64)" in by_member["narrow"].reason
    assert "tensor model.layers.1.mlp.up_proj.weight has other shapes ([100, 64], [172, 64])" in by_member["odd"].reason
    assert suggest(matrix, ClusterSection()).clusters == len(expected)


def test_a_zoo_of_forty_is_read_once(forty: tuple[list[Checkpoint], dict[str, str], Store], tmp_path: Path) -> None:
    models, _, _ = forty
    matrix = compare(Zoo(members=tuple(models)), Store(tmp_path))
    assert matrix.read_bytes == sum(one.size_bytes for one in models)


def test_cluster_shows_and_draws(cli: Cli, tmp_path: Path) -> None:
    broken = tmp_path / "<b>broken"
    broken.mkdir()
    recipe = tmp_path / "r.yaml"
    models = "\n".join(
        f"    - {{id: {name}, model: {MODELS / name}}}"
        for name in ("stories", "stories-math", "stories-web", "script-code")
    )
    recipe.write_text(
        f'name: r\nzoo:\n  on_error: skip\n  models:\n{models}\n    - {{id: bad, model: "{broken}"}}\n'
        "cluster: {method: agglomerative}\nevaluate: {tasks: [arc_easy]}\n"
    )
    result = cli("cluster", str(recipe), "--html", "page.html", "--suggest")
    assert result.returncode == 0, result.stderr
    assert "4 models in 2 clusters; read" in result.stdout
    assert "cluster.threshold=" in result.stdout
    assert "skipped: bad:" in result.stdout
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 2
    assert "&lt;b&gt;broken" in page
    assert "<b>broken" not in page
    again = cli("cluster", str(recipe), "--json")
    found = json.loads(again.stdout)
    assert found["similarity"]["read_bytes"] == 0, "known from the first time"
    assert [one["members"] for one in found["clusters"]] == [
        ["stories", "stories-math", "stories-web"],
        ["script-code"],
    ]
    assert set(found["skipped"]) == {"bad"}
    strict = cli("cluster", str(recipe), "zoo.on_error=stop")
    assert strict.returncode == 3
    assert "model 'bad'" in strict.stderr


@pytest.mark.parametrize("method", METHODS)
def test_what_is_kept_apart_is_merged_with_nothing(method: str) -> None:
    matrix = matrix_of([[], [0.99], [0.99, 0.99]])
    section = ClusterSection(method=method, apart=["b"])  # type: ignore[arg-type]
    first, second = cluster(matrix, section)
    assert (first.members, second.members) == (("a", "c"), ("b",))
    assert "cluster.apart keeps b whole" in second.reason
    assert all("b" not in (matrix.ids[i] for i in one.first + one.second) for one in joins(matrix, section))
