"""Operators: the arithmetic is mergekit's to the last bit, what is kept is what was tried, wrong use is explained."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from composer.artefacts import Store
from composer.errors import MergeError
from composer.merging.engine.export import LINEAGE, export
from composer.merging.engine.live import LiveModel
from composer.merging.engine.memo import Memo
from composer.merging.engine.merge import Merge
from composer.merging.engine.shelf import MappedStatistics, Shelf
from composer.merging.engine.stock import FILE
from composer.merging.operators import OPERATORS, group_of
from composer.merging.plan import MergeStep
from composer.merging.smoke import smoke_check
from composer.merging.workbench import rounding_warning
from composer.probes import load_texts, record_fisher, record_grams
from composer.zoo import Checkpoint, Lineage, inspect_checkpoint
from tests.checkpoints import add_tokens, write_checkpoint
from tests.conftest import MODELS

MEMBERS = ("stories-math", "stories-science", "stories-web")
STOCK = [name for name in OPERATORS.names() if OPERATORS.get(name).method and name != "passthrough"]

# Beside every operator's defaults: what takes other paths through the arithmetic.
VARIANTS: list[tuple[str, dict[str, object]]] = [
    ("linear", {"weight": [0.2, 0.7, 0.4], "normalize": False}),
    ("linear", {"weight": [[0.1, 0.5, 0.9], 0.4, [1.0, 0.3, 0.2]]}),
    ("slerp", {"t": [0.2, 0.9, 0.4]}),
    ("nuslerp", {"weight": [0.3, 0.7], "nuslerp_flatten": False}),
    ("nuslerp", {"weight": [0.3, 0.7], "nuslerp_flatten": False, "nuslerp_row_wise": True, "from_base": True}),
    ("multislerp", {"weight": [0.5, 0.2, 0.3], "from_base": True}),
    ("task_arithmetic", {"weight": [0.9, 0.2, 0.4], "lambda": 0.7}),
    ("task_arithmetic", {"weight": [[0.9, 0.1, 0.3], 0.2, [0.4, 0.5, 0.6]], "normalize": True}),
    ("ties", {"density": [0.1, 0.5, 1.0], "weight": [0.3, 0.9, 0.5], "rescale": True}),
    ("ties", {"normalize": False, "lambda": 1.3}),
    ("dare_linear", {"density": 0.2, "rescale": False}),
    ("dare_ties", {"density": [[0.3, 0.9, 1.0], 0.5, 0.7], "normalize": True}),
    ("della", {"density": 0.3, "epsilon": 0.1}),
    ("breadcrumbs", {"density": 0.6, "gamma": 0.05, "rescale": True}),
    ("breadcrumbs_ties", {"density": 0.99, "gamma": 0.05}),
    ("model_stock", {"filter_wise": True}),
    ("sce", {"select_topk": 0.1}),
]


def bind(
    operator: str,
    quick: dict[str, Checkpoint],
    names: tuple[str, ...] = MEMBERS,
    shelf: Shelf | None = None,
    *,
    base: str | None = "stories",
    seed: int = 3,
    **parameters: object,
) -> Merge:
    chosen = names[: OPERATORS.get(operator).most or len(names)]
    step = MergeStep(name=f"by-{operator}", operator=operator, inputs=chosen, parameters=parameters)  # type: ignore[arg-type]
    origin = quick[base] if base else None
    return Merge(step, [quick[name] for name in chosen], origin, shelf or Shelf(), seed=seed)


def whole(merge: Merge) -> dict[str, torch.Tensor]:
    """Return the merge's tensors."""
    tensors = {
        name: torch.full((slot.header.elements,), float("nan"), dtype=slot.header.torch_dtype)
        for name, slot in merge.slots.items()
    }
    for name, start, block in merge.blocks():
        tensors[name][start : start + block.numel()] = block
    return {name: tensor.reshape(merge.slots[name].header.shape) for name, tensor in tensors.items()}


def by_mergekit(configuration: Path, out: Path, seed: int) -> dict[str, torch.Tensor]:
    """Return what the stock tool makes of a configuration."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    config = MergeConfiguration.model_validate(yaml.safe_load(configuration.read_text()))
    run_merge(config, str(out), MergeOptions(quiet=True, random_seed=seed))
    return load_file(out / "model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize(("operator", "parameters"), [*((name, {}) for name in STOCK), *VARIANTS], ids=str)
def test_what_is_tried_is_kept_and_is_mergekits_to_the_last_bit(
    operator: str, parameters: dict[str, object], quick: dict[str, Checkpoint], store: Store, tmp_path: Path
) -> None:
    shelf = Shelf()
    merge = bind(operator, quick, shelf=shelf, **parameters)
    first = whole(merge)
    live = LiveModel(merge)
    live.load(merge)  # the second time, from what is remembered
    kept = export(merge, "kept", store)
    written = load_file(Path(kept.path) / "model.safetensors")
    assert same(first, written)
    state = live.model.state_dict()
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in written.items())
    assert same(by_mergekit(Path(kept.path) / FILE, tmp_path / "stock", merge.seed), written)


@pytest.mark.parametrize(("dtype", "blurs"), [("bfloat16", True), ("float16", False)])
def test_a_merge_that_its_storage_type_blurs_says_so(
    dtype: str, blurs: bool, quick: dict[str, Checkpoint], store: Store
) -> None:
    step = MergeStep(name="m", operator="task_arithmetic", inputs=("stories-math",), parameters={"weight": 0.01})
    inputs, base = [quick["stories-math"]], quick["stories"]
    kept = export(Merge(step, inputs, base, Shelf(), dtype=dtype), "kept", store)
    origin, tuned, written = (load_file(Path(one.path) / "model.safetensors") for one in (base, *inputs, kept))
    lost = changed = 0.0
    for name, tensor in origin.items():
        exact = tensor.float() + 0.01 * (tuned[name].float() - tensor.float())
        lost += float((written[name].float() - exact).square().sum())
        changed += float((exact - tensor.float()).square().sum())
    assert kept.lineage is not None
    assert kept.lineage.rounding == pytest.approx((lost / changed) ** 0.5, rel=0.2)  # from the first block of each
    warning = rounding_warning(kept)
    assert (warning is not None and "merge.dtype: float16" in warning) == blurs
    again = export(Merge(step, inputs, base, Shelf(), dtype=dtype), "again", store)
    assert again.lineage is not None
    assert again.lineage.rounding == kept.lineage.rounding, "known without writing it again"


def test_another_seed_draws_another_mask(quick: dict[str, Checkpoint]) -> None:
    shelf = Shelf()
    first, second = (whole(bind("dare_linear", quick, shelf=shelf, seed=seed)) for seed in (1, 2))
    assert not same(first, second)
    assert same(first, whole(bind("dare_linear", quick, seed=1)))


def test_what_is_forgotten_is_computed_again(quick: dict[str, Checkpoint]) -> None:
    narrow = Shelf(memo=Memo(limit=100))
    merge = bind("ties", quick, shelf=narrow)
    assert same(whole(merge), whole(merge))
    assert same(whole(merge), whole(bind("ties", quick)))


def test_masks_are_computed_once(quick: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    import mergekit.sparsify

    sorts = []
    real = mergekit.sparsify.sparsify
    monkeypatch.setattr(mergekit.sparsify, "sparsify", lambda *given, **named: sorts.append(1) or real(*given, **named))
    shelf = Shelf()
    whole(bind("ties", quick, MEMBERS[:2], shelf))
    tensors = len(bind("ties", quick).slots)
    assert len(sorts) == 2 * tensors
    whole(bind("ties", quick, MEMBERS[:2], shelf, weight=[0.2, 0.9]))
    assert len(sorts) == 2 * tensors, "other weights need no other masks"
    whole(bind("ties", quick, MEMBERS, shelf))
    assert len(sorts) == 3 * tensors, "another input needs its own mask only"
    whole(bind("breadcrumbs_ties", quick, MEMBERS, shelf))
    assert len(sorts) == 6 * tensors, "another operator chooses otherwise"


def weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in load_file(Path(checkpoint.path) / "model.safetensors").items()}


def test_the_arithmetic_is_what_the_papers_say(quick: dict[str, Checkpoint]) -> None:
    parts, base = [weights(quick[name]) for name in MEMBERS], weights(quick["stories"])
    mean = whole(bind("linear", quick, weight=[1.0, 2.0, 1.0]))
    sums = whole(bind("task_arithmetic", quick, weight=0.4))
    for name in base:
        expected = (parts[0][name] + 2 * parts[1][name] + parts[2][name]) / 4
        assert torch.allclose(mean[name].double(), expected, rtol=2**-7, atol=1e-6), name
        expected = base[name] + 0.4 * sum(part[name] - base[name] for part in parts)
        assert torch.allclose(sums[name].double(), expected, rtol=2**-7, atol=1e-6), name


def test_layers_have_coefficients_of_their_own(quick: dict[str, Checkpoint]) -> None:
    assert [group_of(layer, 5, 3) for layer in (0, 1, 2, 3, 4, None)] == [0, 0, 0, 1, 1, 2]
    merged = whole(bind("linear", quick, MEMBERS[:2], weight=[[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]]))
    first, second = (weights(quick[name]) for name in MEMBERS[:2])
    layers = quick["stories"].layers or 0
    for name, tensor in merged.items():
        if ".layers.0." in name:
            assert torch.equal(tensor.double(), first[name]), name
        elif f".layers.{layers - 1}." in name:
            assert torch.equal(tensor.double(), second[name]), name
        elif "layers" not in name:
            assert torch.allclose(tensor.double(), (first[name] + second[name]) / 2, rtol=2**-7, atol=1e-6), name


@pytest.fixture(scope="module")
def statistics(quick: dict[str, Checkpoint], shared_store: Store) -> Callable[[str, Checkpoint], MappedStatistics]:
    texts = load_texts("default", 6, 200)

    def record(kind: str, checkpoint: Checkpoint) -> MappedStatistics:
        recorder = record_fisher if kind == "fisher" else record_grams
        return MappedStatistics(recorder(checkpoint, texts, shared_store))

    return record


def test_fisher_weighs_by_information(quick: dict[str, Checkpoint], statistics, store: Store) -> None:  # type: ignore[no-untyped-def]
    merged = whole(bind("fisher", quick, MEMBERS[:2], Shelf(statistics), weight=[1.0, 3.0]))
    parts = [weights(quick[name]) for name in MEMBERS[:2]]
    known = [statistics("fisher", quick[name]) for name in MEMBERS[:2]]
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"):
        fishers = [one.flat(name).double().reshape(parts[0][name].shape) for one in known]
        fishers = [weight * (one + 1e-8 * one.mean()) for weight, one in zip((1.0, 3.0), fishers, strict=True)]
        expected = (fishers[0] * parts[0][name] + fishers[1] * parts[1][name]) / (fishers[0] + fishers[1])
        assert torch.allclose(merged[name].double(), expected, rtol=2**-7, atol=1e-5), name
    alone = whole(bind("fisher", quick, (MEMBERS[0],) * 2, Shelf(statistics)))
    assert all(torch.equal(tensor.double(), parts[0][name]) for name, tensor in alone.items())


def test_regmean_gives_what_the_layers_give(quick: dict[str, Checkpoint], statistics) -> None:  # type: ignore[no-untyped-def]
    parts = [weights(quick[name]) for name in MEMBERS[:2]]
    alone = whole(bind("regmean", quick, (MEMBERS[0],) * 2, Shelf(statistics)))
    assert all(torch.allclose(t.double(), parts[0][n], rtol=2**-6, atol=1e-4) for n, t in alone.items())
    merged = whole(bind("regmean", quick, MEMBERS[:2], Shelf(statistics), alpha=1.0))
    mean = whole(bind("linear", quick, MEMBERS[:2]))
    name = "model.layers.1.mlp.down_proj.weight"
    grams = [statistics("grams", quick[one]).flat(name).double() for one in MEMBERS[:2]]
    size = parts[0][name].shape[1]

    def loss(weight: torch.Tensor) -> float:
        """Squared distance of the layer's outputs to those of the two inputs' layers on their own inputs."""
        gaps = [weight.double() - part[name] for part in parts]
        return sum(float(((gap @ g.reshape(size, size)) * gap).sum()) for gap, g in zip(gaps, grams, strict=True))

    assert loss(merged[name]) < loss(mean[name])


def test_statistics_without_anybody_to_record_them(quick: dict[str, Checkpoint]) -> None:
    with pytest.raises(MergeError, match="no fisher statistics at hand"):
        whole(bind("fisher", quick))


def test_layers_are_stacked(quick: dict[str, Checkpoint], store: Store, tmp_path: Path) -> None:
    merge = bind("passthrough", quick, (MEMBERS[0], MEMBERS[1], MEMBERS[0]), first=[0, 1, 2], last=[2, 3, -1])
    layers = quick[MEMBERS[0]].layers or 0
    count = 2 + 2 + layers - 2
    kept = export(merge, "tall", store)
    assert kept.layers == count
    first, second = (weights(quick[name]) for name in MEMBERS[:2])
    tall = weights(kept)
    down = "model.layers.{}.mlp.down_proj.weight"
    assert torch.equal(tall[down.format(1)], first[down.format(1)])
    assert torch.equal(tall[down.format(2)], second[down.format(1)])
    assert torch.equal(tall[down.format(4)], first[down.format(2)])
    assert torch.equal(tall["model.embed_tokens.weight"], first["model.embed_tokens.weight"])
    assert same(
        by_mergekit(Path(kept.path) / FILE, tmp_path / "stock", 0), load_file(Path(kept.path) / "model.safetensors")
    )
    assert smoke_check(kept, merge.inputs, store).sample
    live = LiveModel(merge)
    live.load(merge)
    ids = torch.tensor([[1, 5, 9, 20]])
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(kept.path, dtype=torch.float32)
    assert torch.equal(live.model(ids).logits, again(ids).logits)


def test_a_stack_of_layers_that_are_not_there(quick: dict[str, Checkpoint]) -> None:
    with pytest.raises(MergeError, match=r"layers 0 to 99 of 'stories-math', which has \d+"):
        bind("passthrough", quick, MEMBERS[:1], last=99)


def test_a_kept_merge_says_where_it_comes_from(quick: dict[str, Checkpoint], store: Store) -> None:
    kept = export(bind("dare_ties", quick, seed=7), "blend", store)
    home = Path(kept.path)
    lineage = Lineage.load(home / LINEAGE)
    assert lineage == kept.lineage
    assert lineage.input_hashes == tuple(quick[name].content_hash for name in MEMBERS)
    assert (lineage.base, lineage.seed) == (quick["stories"].content_hash, 7)
    assert lineage.parameters["density"] == 0.5
    assert set(lineage.licences) == {*MEMBERS, "stories"}
    card = (home / "README.md").read_text()
    for needle in ("# blend", "dare_ties", *MEMBERS, lineage.input_hashes[0], "| seed | 7 |", "random-seed 7"):
        assert needle in card
    assert json.loads((home / "config.json").read_text())["dtype"] == "bfloat16"
    assert all(file.stat().st_mode & 0o044 for file in home.iterdir())
    assert export(bind("dare_ties", quick, seed=7), "blend", store).path == kept.path
    assert export(bind("dare_ties", quick, seed=8), "blend", store).path != kept.path


def test_merges_of_merges_are_made_again_by_mergekit_multi(
    quick: dict[str, Checkpoint], store: Store, tmp_path: Path
) -> None:
    from click.testing import CliRunner
    from mergekit.scripts.multimerge import main

    pair = export(bind("slerp", quick, MEMBERS[:2]), "pair", store)
    step = MergeStep(name="all", operator="slerp", inputs=("pair", MEMBERS[2]), parameters={"t": 0.3})
    everything = export(Merge(step, [pair, quick[MEMBERS[2]]], None, Shelf()), "all", store)
    out = tmp_path / "out"
    file = str(Path(everything.path) / FILE)
    result = CliRunner().invoke(main, [file, "-I", str(tmp_path / "between"), "--out-path", str(out)])
    assert result.exit_code == 0, result.output
    made = next(found for found in tmp_path.rglob("model.safetensors") if "all" in str(found) or found.parent == out)
    assert same(load_file(made), load_file(Path(everything.path) / "model.safetensors"))


def test_wrong_use_is_explained(quick: dict[str, Checkpoint]) -> None:
    for message, operator, names, parameters in (
        ("no parameter 'wieght'; did you mean 'weight'", "linear", MEMBERS, {"wieght": 1.0}),
        ("'weight' takes 3 values, one per input", "linear", MEMBERS, {"weight": [1.0]}),
        ("'karcher' takes at least 2 models", "karcher", MEMBERS[:1], {}),
        ("'density' must be above 0 and at most 1 \\(read 0", "ties", MEMBERS, {"density": 0.0}),
        ("'density' must be above 0 and at most 1 \\(read 2", "dare_ties", MEMBERS, {"density": [0.5, 2.0, 0.5]}),
        ("'density' must be above 0 and at most 1 \\(read nan", "ties", MEMBERS, {"density": float("nan")}),
        ("the weights sum to 0", "linear", MEMBERS, {"weight": [1.0, -1.0, 0.0]}),
        ("the weights sum to 0", "linear", MEMBERS, {"weight": [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]}),
        ("density ± epsilon must lie within 0 and 1", "della", MEMBERS, {"density": 0.9, "epsilon": 0.2}),
        ("'normalize' is true or false", "linear", MEMBERS, {"normalize": 1.0}),
        ("groups of layers", "linear", MEMBERS, {"weight": [[1.0] * 99] * 3}),
        ("for 2 and for 3 groups", "linear", MEMBERS, {"weight": [[1.0, 1.0], [1.0, 1.0, 1.0], 1.0]}),
    ):
        with pytest.raises(MergeError, match=message):
            bind(operator, quick, names, **parameters)
    step = MergeStep(name="x", operator="slerp", inputs=MEMBERS)
    with pytest.raises(MergeError, match="'slerp' takes exactly 2 models"):
        Merge(step, [quick[name] for name in MEMBERS], None, Shelf())
    with pytest.raises(MergeError, match=r"works on task vectors; set zoo\.base"):
        bind("ties", quick, base=None)


def test_shapes_that_disagree_name_the_tensor(quick: dict[str, Checkpoint], tmp_path: Path, store: Store) -> None:
    tensors = load_file(MODELS / "stories-math" / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(3)
    odd = inspect_checkpoint("odd", write_checkpoint(tmp_path / "odd", tensors), store)
    step = MergeStep(name="x", operator="linear", inputs=("stories-web", "odd"))
    with pytest.raises(MergeError, match=r"model\.norm\.weight has shape \[\d+\] in 'stories-web' and \[3\] in 'odd'"):
        Merge(step, [quick["stories-web"], odd], None, Shelf())
    del tensors["model.norm.weight"]
    odd = inspect_checkpoint("odd", write_checkpoint(tmp_path / "less", tensors), store)
    with pytest.raises(MergeError, match=r"'odd' has no tensor model\.norm\.weight"):
        Merge(step, [quick["stories-web"], odd], None, Shelf())


@pytest.mark.parametrize("tokenizer", ["union", "base"])
def test_differing_vocabularies_are_brought_together(
    tokenizer: str, quick: dict[str, Checkpoint], tmp_path: Path, store: Store
) -> None:
    tensors = load_file(MODELS / "stories-math" / "model.safetensors")
    name = "model.embed_tokens.weight"
    rows = tensors[name].shape[0]
    extra = torch.full((2, tensors[name].shape[1]), 0.25, dtype=tensors[name].dtype)
    tensors[name] = torch.cat([tensors[name], extra])
    path = write_checkpoint(tmp_path / "more", tensors, like=MODELS / "stories-math", vocab_size=rows + 2)
    add_tokens(path, "<think>", "</think>")
    more = inspect_checkpoint("more", path, store)
    step = MergeStep(name="x", operator="task_arithmetic", inputs=("stories-web", "more"), parameters={"weight": 0.5})
    merge = Merge(step, [quick["stories-web"], more], quick["stories"], Shelf(), tokenizer=tokenizer)
    kept = export(merge, "kept", store)
    assert kept.vocabulary_size == (rows + 2 if tokenizer == "union" else rows)
    written = load_file(Path(kept.path) / "model.safetensors")
    assert same(by_mergekit(Path(kept.path) / FILE, tmp_path / "stock", 0), written)
    live = LiveModel(merge)
    live.load(merge)
    assert torch.equal(live.model.state_dict()[name], written[name].float())
    known = ("<think>" in live.tokenizer.get_vocab(), kept.tokenizer.size)
    assert known == ((True, rows + 2) if tokenizer == "union" else (False, rows))


def test_models_whose_weights_are_converted_on_loading_are_tried_too(tmp_path: Path, store: Store) -> None:
    from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=512, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, max_position_embeddings=64,
    )  # fmt: skip
    paths = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        MixtralForCausalLM(config).save_pretrained(path := tmp_path / f"mix{seed}")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (path / file).write_bytes((MODELS / "stories" / file).read_bytes())
        paths.append(inspect_checkpoint(f"mix{seed}", path, store))
    merge = Merge(MergeStep(name="x", operator="linear", inputs=("mix0", "mix1")), paths, None, Shelf())
    live = LiveModel(merge)
    live.load(merge)
    kept = AutoModelForCausalLM.from_pretrained(export(merge, "x", store).path, dtype=torch.float32)
    ids = torch.tensor([[1, 5, 9, 20]])
    assert torch.equal(live.model(ids).logits, kept(ids).logits)


@given(
    weights_=st.lists(st.floats(-2, 2), min_size=3, max_size=3).filter(lambda one: abs(sum(one)) > 0.01),
    scale=st.floats(0.1, 10),
)
def test_shares_are_shares_whatever_their_scale(
    weights_: list[float], scale: float, quick: dict[str, Checkpoint]
) -> None:
    first = whole(bind("linear", quick, weight=weights_))
    second = whole(bind("linear", quick, weight=[one * scale for one in weights_]))
    for name, tensor in first.items():
        assert torch.allclose(tensor.float(), second[name].float(), rtol=2**-6, atol=1e-2), name


def test_operators_are_listed(cli) -> None:  # type: ignore[no-untyped-def]
    listed = cli("operators")
    assert listed.returncode == 0, listed.stderr
    for name in OPERATORS.names():
        assert name in listed.stdout
    one = cli("operators", "ties")
    assert "density" in one.stdout and "0.3" in one.stdout and "arXiv 2306.01708" in one.stdout
    everything = json.loads(cli("operators", "--json").stdout)
    assert everything["ties"]["parameters"]["density"]["default"] == 0.3
    wrong = cli("operators", "tise")
    assert (wrong.returncode, "did you mean 'ties'" in wrong.stderr) == (2, True)


def test_the_smoke_check_finds_broken_models(quick: dict[str, Checkpoint], tmp_path: Path, store: Store) -> None:
    inputs = [quick["stories-math"]]
    for name, spoil in (
        ("nan", lambda tensor: tensor * float("nan")),
        ("noise", lambda tensor: torch.randn_like(tensor.float()).to(tensor.dtype)),
    ):
        tensors = load_file(Path(inputs[0].path) / "model.safetensors")
        spoiled = {key: spoil(one) if "mlp" in key or "embed" in key else one for key, one in tensors.items()}
        broken = inspect_checkpoint(name, write_checkpoint(tmp_path / name, spoiled), store)
        problem = smoke_check(broken, inputs, store).problem
        assert ("NaN" if name == "nan" else "perplexity exploded") in (problem or "")


def test_the_smoke_check_is_an_artefact(quick: dict[str, Checkpoint], store: Store) -> None:
    kept = export(bind("linear", quick), "kept", store)
    found = smoke_check(kept, [quick[name] for name in MEMBERS], store)
    assert found.problem is None
    assert found.sample.startswith("Once upon a time")
    assert set(found.inputs) == set(MEMBERS)
    assert found.perplexity is not None
    assert found.perplexity < 4 * max(found.inputs.values())
    assert smoke_check(kept, [], store) == found, "read, not measured again"


def test_odd_paths_and_a_full_disk(
    quick: dict[str, Checkpoint], tmp_path: Path, store: Store, small_disk: Path
) -> None:
    import shutil

    from composer.errors import DiskFullError

    odd = Path(shutil.copytree(quick["stories-math"].path, tmp_path / "a+b@c"))
    step = MergeStep(name="x", operator="linear", inputs=("odd", "stories-web"))
    merge = Merge(step, [inspect_checkpoint("odd", odd, store), quick["stories-web"]], None, Shelf())
    assert same(whole(merge), whole(bind("linear", quick, ("stories-math", "stories-web"))))
    (small_disk / "ballast").write_bytes(b"0" * 900_000)
    narrow = Store(small_disk / "store")
    with pytest.raises(DiskFullError):
        export(merge, "x", narrow)
    assert list((narrow.root / "merged").iterdir()) == [], "nothing half-written stays"
