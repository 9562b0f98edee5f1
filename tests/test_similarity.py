"""Similarity: the streamed numbers are the direct ones, each file is read once, and nothing known is computed again."""

import tempfile
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from composer.artefacts import Store
from composer.errors import ZooError
from composer.progress import Step, silent
from composer.similarity import SignalSection, compare, streamed
from composer.similarity.moments import Moments, MomentsCache
from composer.zoo import Checkpoint, Zoo, inspect_checkpoint
from composer.zoo.kinds import kind_of
from tests.checkpoints import add_tokens, write_checkpoint

Tensors = dict[str, torch.Tensor]
ALL = ("attention", "mlp", "embeddings", "norms", "other")


def state(checkpoint: Checkpoint) -> Tensors:
    files = sorted(Path(checkpoint.path).glob("*.safetensors"))
    return {name: tensor.double() for file in files for name, tensor in load_file(file).items()}


def direct_cosine(
    a: Tensors, b: Tensors, kinds: tuple[str, ...] = ("attention", "mlp"), *, columns: bool = False
) -> float | None:
    """Cosines in float64, averaged over tensors; None if none has a direction in both."""
    values = []
    for name in a:
        if kind_of(name) not in kinds:
            continue
        x, y = a[name], b[name]
        scale = x.norm(dim=0) * y.norm(dim=0)
        if columns and x.ndim == 2 and (scale > 0).any():
            values.append(float(((x * y).sum(dim=0)[scale > 0] / scale[scale > 0]).mean()))
        elif x.norm() and y.norm():
            values.append(float((x * y).sum() / x.norm() / y.norm()))
    return sum(values) / len(values) if values else None


def stored(cache: MomentsCache, a: Checkpoint, b: Checkpoint, base: Checkpoint | None = None) -> Moments:
    moments = cache.load(a.content_hash, b.content_hash, base.content_hash if base else None, columns=False)
    assert moments is not None
    return moments


@st.composite
def zoos(draw: st.DrawFn) -> tuple[list[Tensors], torch.dtype, int]:
    """Two to four models of one random shape; the first is the base."""
    hidden, inner, rows = draw(st.integers(1, 40)), draw(st.integers(1, 90)), draw(st.integers(1, 60))
    shapes = {
        "model.embed_tokens.weight": (rows, hidden),
        "model.layers.0.self_attn.q_proj.weight": (hidden, hidden),
        "model.layers.0.mlp.up_proj.weight": (inner, hidden),
        "model.layers.1.mlp.down_proj.weight": (hidden, inner),
        "model.layers.0.input_layernorm.weight": (hidden,),
    }
    if draw(st.booleans()):
        shapes["lm_head.weight"] = (rows, hidden)
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]))
    scale = draw(st.sampled_from([1e-3, 1.0, 300.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    base = {
        name: scale * torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()
    }
    models = [base]
    for _ in range(draw(st.integers(1, 3))):
        step = draw(st.sampled_from([0.03, 1.0]))
        noise = {
            name: torch.randn(tensor.shape, generator=generator, dtype=torch.float64) for name, tensor in base.items()
        }
        kept = {name: torch.rand(tensor.shape, generator=generator) < 0.7 for name, tensor in base.items()}
        models.append({name: tensor + step * scale * noise[name] * kept[name] for name, tensor in base.items()})
    return [{name: tensor.to(dtype) for name, tensor in one.items()} for one in models], dtype, draw(st.integers(1, 3))


@settings(max_examples=60, deadline=None)
@given(zoos(), st.sampled_from([64, 4096, 1 << 21]))
def test_streamed_equals_direct(drawn: tuple[list[Tensors], torch.dtype, int], block: int) -> None:
    tensors, _, shards = drawn
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamed, "BLOCK_ELEMENTS", block)
        store = Store(Path(directory) / "store")
        models = [
            inspect_checkpoint(f"m{i}", write_checkpoint(Path(directory) / f"m{i}", one, shards=shards), store)
            for i, one in enumerate(tensors)
        ]
        base, *tuned = models
        zoo = Zoo(members=tuple(models), base=base)
        states = {one.id: state(one) for one in models}
        deltas = {one.id: {n: states[one.id][n] - states[base.id][n] for n in states[base.id]} for one in tuned}
        for columns in (False, True):
            matrix = compare(zoo, store, SignalSection(per_column=columns))
            for a, b in combinations(models, 2):
                expected = direct_cosine(states[a.id], states[b.id], columns=columns)
                assert matrix.between(a.id, b.id) == pytest.approx(expected, abs=1e-6)
                assert matrix.between(a.id, b.id) == matrix.between(b.id, a.id)
            matrix = compare(zoo, store, SignalSection(signal="deltas", per_column=columns))
            for a, b in combinations(tuned, 2):
                expected = direct_cosine(deltas[a.id], deltas[b.id], columns=columns)
                assert matrix.between(a.id, b.id) == (
                    None if expected is None else pytest.approx(expected, abs=1e-6)
                ), "models of one weight may differ from their base in nothing"
        cache = MomentsCache(store)
        for (one, values), origin in product((("weights", states), ("deltas", deltas)), (base,)):
            for a, b in combinations([m for m in models if m.id in values], 2):
                moments = stored(cache, a, b, origin if one == "deltas" else None)
                for name in values[a.id]:
                    place = moments.names.index(name)
                    x, y = values[a.id][name], values[b.id][name]
                    assert moments.first_squares[place] == pytest.approx(float(x.square().sum()), rel=1e-6)
                    assert moments.second_squares[place] == pytest.approx(float(y.square().sum()), rel=1e-6)
                    assert moments.both_nonzero[place] == int(((x != 0) & (y != 0)).sum())
                    assert moments.same_signs[place] == int((x * y > 0).sum())
                x, y = (torch.cat([values[m.id][n].flatten() for n in sorted(values[m.id])]) for m in (a, b))
                both = (x != 0) & (y != 0)
                if both.any():
                    share = float((x * y > 0).sum() / both.sum())
                    assert moments.sign_agreement(ALL) == pytest.approx(share, abs=1e-6)
                if x.any():
                    assert moments.norm_ratio(ALL) == pytest.approx(float(y.norm() / x.norm()), rel=1e-6)


def zoo_of(directory: Path, store: Store, count: int, **extra: torch.Tensor) -> list[Checkpoint]:
    """Models of one family: a base and copies of it with noise."""
    generator = torch.Generator().manual_seed(1)
    base = load_file(Path(__file__).parent.parent / "recipes/quickstart/models/stories/model.safetensors")
    models = []
    for number in range(count):
        noise = {
            name: (
                tensor.float()
                + 0.02 * number**0.5 * torch.randn(tensor.shape, generator=generator) * tensor.float().std()
            )
            for name, tensor in base.items()
        }
        path = write_checkpoint(directory / f"m{number}", {name: one.to(torch.bfloat16) for name, one in noise.items()})
        models.append(inspect_checkpoint(f"m{number}", path, store))
    return models


def test_each_tensor_is_read_once_and_nothing_twice(tmp_path: Path, store: Store) -> None:
    models = zoo_of(tmp_path, store, 5)
    size = models[0].size_bytes
    steps: list[Step] = []
    first = compare(Zoo(members=tuple(models[:4])), store, progress=steps.append)
    assert first.read_bytes == 4 * size
    assert steps[-1].done == steps[-1].total == 4 * size
    assert compare(Zoo(members=tuple(models[:4])), store).read_bytes == 0
    known = {file: file.stat().st_mtime_ns for file in (store.root / "moments").iterdir()}
    grown = compare(Zoo(members=tuple(models)), store)
    assert grown.read_bytes == 5 * size, "one more read of each"
    assert all(file.stat().st_mtime_ns == time for file, time in known.items()), "known pairs are left alone"
    assert len(list((store.root / "moments").iterdir())) == 10
    for a, b in combinations(models[:4], 2):
        assert grown.between(a.id, b.id) == first.between(a.id, b.id)


def test_what_was_measured_in_another_zoo_counts(tmp_path: Path, store: Store) -> None:
    a, b, c = zoo_of(tmp_path, store, 3)
    compare(Zoo(members=(a, b)), store)
    compare(Zoo(members=(c, b)), store)
    matrix = compare(Zoo(members=(c, a, b)), store)
    assert matrix.read_bytes == 2 * a.size_bytes, "only the pair of a and c was unknown"
    assert matrix.between("m0", "m1") == pytest.approx(direct_cosine(state(a), state(b)), abs=1e-6)


def test_task_vectors_of_a_given_base(quick: dict[str, Checkpoint], store: Store) -> None:
    names = ("stories-math", "stories-web", "stories-law")
    zoo = Zoo(members=tuple(quick[name] for name in names), base=quick["stories"].renamed("base"))
    matrix = compare(zoo, store, SignalSection(signal="deltas"))
    base = state(quick["stories"])
    for a, b in combinations(names, 2):
        first, second = ({n: state(quick[one])[n] - base[n] for n in base} for one in (a, b))
        assert matrix.between(a, b) == pytest.approx(direct_cosine(first, second), abs=1e-6)
    assert (matrix.base, matrix.base_reason) == ("base", "as the recipe says")


def test_the_base_is_inferred_where_one_stands_out(tmp_path: Path, store: Store) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(40, 30, generator=generator) for i in range(4)}
    tensors = [{n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in base.items()} for _ in range(4)]
    tensors.insert(2, base)
    models = [
        inspect_checkpoint(f"m{i}", write_checkpoint(tmp_path / f"m{i}", one), store) for i, one in enumerate(tensors)
    ]
    matrix = compare(Zoo(members=tuple(models)), store, SignalSection(signal="deltas"))
    assert matrix.base == "m2"
    assert "inferred: seen from m2 the others point in unrelated directions" in (matrix.base_reason or "")
    assert matrix.between("m0", "m1") == pytest.approx(
        direct_cosine(*({n: one[n].double() - base[n] for n in base} for one in (tensors[0], tensors[1]))), abs=1e-6
    )
    assert matrix.between("m2", "m1") is None
    assert matrix.why_undefined("m1", "m2") == "m2 is the base and has no task vector"
    without = compare(
        Zoo(members=tuple(one for one in models if one.id != "m2")), store, SignalSection(signal="deltas")
    )
    assert without.between("m0", "m1") is None
    assert "no base is given and none stands out" in (without.why_undefined("m0", "m1") or "")


def test_modules_are_chosen(quick: dict[str, Checkpoint], store: Store) -> None:
    zoo = Zoo(members=(quick["stories"], quick["stories-math"]))
    values = {}
    for kind in ("attention", "mlp", "embeddings", "norms"):
        matrix = compare(zoo, store, SignalSection(modules=[kind]))
        values[kind] = matrix.between("stories", "stories-math")
        expected = direct_cosine(state(quick["stories"]), state(quick["stories-math"]), (kind,))
        assert values[kind] == pytest.approx(expected, abs=1e-6)
    assert len(set(values.values())) == 4


def test_vocabularies_with_added_tokens_are_compared_by_token(
    tmp_path: Path, store: Store, quick: dict[str, Checkpoint]
) -> None:
    plain = quick["stories"]
    tensors = load_file(Path(plain.path) / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    models = [plain]
    for name, tokens in (("two", ("<a>", "<b>")), ("other", ("<c>",))):
        changed = {
            n: (t.float() + 0.05 * torch.randn(t.shape, generator=generator)).to(t.dtype) for n, t in tensors.items()
        }
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            if key in changed:
                extra = torch.randn(len(tokens), changed[key].shape[1], generator=generator).to(changed[key].dtype)
                changed[key] = torch.cat([changed[key], 100 * extra])
        path = write_checkpoint(tmp_path / name, changed, vocab_size=512 + len(tokens))
        add_tokens(path, *tokens)
        models.append(inspect_checkpoint(name, path, store))
    matrix = compare(Zoo(members=tuple(models), base=plain), store, SignalSection(modules=["embeddings"]))
    for a, b in combinations(models, 2):
        first, second = (
            {n: t[:512] if "embed" in n or "lm_head" in n else t for n, t in state(m).items()} for m in (a, b)
        )
        assert matrix.gate(a.id, b.id) is None
        assert matrix.between(a.id, b.id) == pytest.approx(direct_cosine(first, second, ("embeddings",)), abs=1e-6)
    assert matrix.note("stories", "two") == "vocabularies differ by added tokens (<a>, <b>)"
    assert matrix.note("other", "two") == "vocabularies differ by added tokens (<a>, <c>, <b>)"
    deltas = compare(
        Zoo(members=tuple(models), base=plain), store, SignalSection(signal="deltas", modules=["embeddings"])
    )
    base = state(plain)
    first, second = (
        {n: state(m)[n][:512] - base[n] for n in base if "embed" in n or "lm_head" in n} for m in models[1:]
    )
    assert deltas.between("two", "other") == pytest.approx(direct_cosine(first, second, ("embeddings",)), abs=1e-6)


def test_a_shuffled_vocabulary_is_aligned_but_not_mergeable(
    tmp_path: Path, store: Store, quick: dict[str, Checkpoint]
) -> None:
    """The same model with its tokens in another order: its embeddings are the same, token by token."""
    import json

    plain = quick["stories"]
    order = torch.randperm(512, generator=torch.Generator().manual_seed(0))
    tensors = {
        name: tensor[order] if "embed_tokens" in name or "lm_head" in name else tensor
        for name, tensor in load_file(Path(plain.path) / "model.safetensors").items()
    }
    path = write_checkpoint(tmp_path / "shuffled", tensors)
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    place = {int(old): new for new, old in enumerate(order)}
    tokenizer["model"]["vocab"] = {token: place[old] for token, old in tokenizer["model"]["vocab"].items()}
    for token in tokenizer["added_tokens"]:
        token["id"] = place[token["id"]]
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    shuffled = inspect_checkpoint("shuffled", path, store)
    matrix = compare(Zoo(members=(plain, shuffled)), store, SignalSection(modules=["embeddings"]))
    assert matrix.between("stories", "shuffled") == pytest.approx(1.0, abs=1e-6)
    assert matrix.gate("stories", "shuffled") == "another tokenizer vocabulary"


def test_models_of_other_families_are_gated_with_the_reason(quick: dict[str, Checkpoint], store: Store) -> None:
    other = next(one for name, one in quick.items() if not name.startswith("stories"))
    matrix = compare(Zoo(members=(quick["stories"], other)), store)
    assert matrix.between("stories", other.id) is None
    assert "another architecture (LlamaForCausalLM, Qwen2ForCausalLM)" in (matrix.gate("stories", other.id) or "")
    assert matrix.gate(other.id, "stories") == matrix.gate("stories", other.id)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", ["model.layers.2.mlp.up_proj.weight", "model.norm.weight"])
def test_weights_that_are_not_finite_name_file_and_tensor(
    tmp_path: Path, store: Store, value: float, tensor: str
) -> None:
    good, bad, other = zoo_of(tmp_path, store, 3)
    tensors = load_file(Path(bad.path) / "model.safetensors")
    tensors[tensor].view(-1)[7] = value
    save_file(tensors, Path(bad.path) / "model.safetensors")
    bad = inspect_checkpoint("bad", Path(bad.path), store)
    for zoo in (Zoo(members=(bad,)), Zoo(members=(good, bad, other)), Zoo(members=(good,), base=bad)):
        with pytest.raises(ZooError, match=rf"model 'bad': .*model.safetensors: tensor {tensor} holds NaN or infinite"):
            compare(zoo, store)
    matrix = compare(Zoo(members=(good, bad, other)), store, skip_broken=True)
    assert matrix.ids == ("m0", "m2")
    assert matrix.between("m0", "m2") == pytest.approx(direct_cosine(state(good), state(other)), abs=1e-6)
    assert tensor in matrix.skipped["bad"]


def test_a_large_or_tiny_weight_is_no_infinity(tmp_path: Path, store: Store) -> None:
    models = []
    for number, scale in enumerate((1e25, 1e-25)):
        tensors = {"model.layers.0.mlp.up_proj.weight": scale * torch.arange(1, 1201).reshape(30, 40).float()}
        models.append(inspect_checkpoint(f"m{number}", write_checkpoint(tmp_path / f"m{number}", tensors), store))
    assert compare(Zoo(members=tuple(models)), store).between("m0", "m1") == pytest.approx(1.0, abs=1e-6)


def test_a_file_that_breaks_off_between_inspection_and_comparison(tmp_path: Path, store: Store) -> None:
    good, bad, other = zoo_of(tmp_path, store, 3)
    file = Path(bad.path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ZooError, match=r"model 'm1': .*truncated"):
        compare(Zoo(members=(good, bad, other)), store)
    matrix = compare(Zoo(members=(good, bad, other)), store, skip_broken=True)
    assert matrix.ids == ("m0", "m2")
    assert matrix.between("m0", "m2") is not None


def test_memory_does_not_grow_with_the_threads_left_over(quick: dict[str, Checkpoint], store: Store) -> None:
    threads = torch.get_num_threads()
    compare(Zoo(members=(quick["stories"], quick["stories-web"])), store, progress=silent)
    assert torch.get_num_threads() == threads
