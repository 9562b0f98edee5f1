"""Fisher information and inner products of layers' inputs, against computations that share no code with them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from composer.artefacts import Store
from composer.errors import ZooError
from composer.probes import load_texts, record_fisher, record_grams
from composer.probes.curvature import draw
from composer.progress import Step
from composer.zoo import Checkpoint, inspect_checkpoint
from composer.zoo.weights import SafetensorsWeights
from tests.checkpoints import write_checkpoint
from tests.conftest import MODELS

TEXTS = load_texts("default", 6, 200)
EMBEDDING = "model.embed_tokens.weight"


def loaded(checkpoint: Checkpoint) -> tuple[Any, list[torch.Tensor]]:
    """A model in float32 and the token ids of each text, `[1, tokens]`."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
    return model, [tokenizer(text, return_tensors="pt").input_ids for text in TEXTS]


def fisher(checkpoint: Checkpoint, store: Store) -> dict[str, torch.Tensor]:
    return load_file(record_fisher(checkpoint, TEXTS, store) / "fisher.safetensors")


def grams(checkpoint: Checkpoint, store: Store) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    path = record_grams(checkpoint, TEXTS, store)
    return load_file(path / "grams.safetensors"), json.loads((path / "index.json").read_text())


def inputs_of(model: Any, ids: list[torch.Tensor], layer: str) -> torch.Tensor:
    """What a layer is given at all tokens of all texts, `[tokens, in]`, in float64."""
    seen = []
    hook = model.get_submodule(layer).register_forward_hook(lambda _, given, __: seen.append(given[0][0].double()))
    with torch.no_grad():
        for one in ids:
            model(one)
    hook.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("name", ["stories-math", "script-code"])
def test_fisher_covers_the_checkpoint(quick: dict[str, Checkpoint], shared_store: Store, name: str) -> None:
    found = fisher(quick[name], shared_store)
    headers = SafetensorsWeights(Path(quick[name].path)).headers
    assert {one: tuple(tensor.shape) for one, tensor in found.items()} == {
        one: header.shape for one, header in headers.items()
    }
    assert EMBEDDING in found, "the head is the embedding"
    assert "lm_head.weight" not in found
    for tensor in found.values():
        assert tensor.dtype == torch.float32
        assert tensor.isfinite().all()
        assert (tensor >= 0).all()
        assert tensor.max() > 0


@pytest.mark.parametrize("name", ["stories-math", "script-code"])
def test_fisher_is_the_mean_of_squared_gradients(quick: dict[str, Checkpoint], shared_store: Store, name: str) -> None:
    found = fisher(quick[name], shared_store)
    model, ids = loaded(quick[name])
    parameters = dict(model.named_parameters())
    expected = {one: torch.zeros_like(parameter, dtype=torch.float64) for one, parameter in parameters.items()}
    for text, one in zip(TEXTS, ids, strict=True):
        model.zero_grad()
        chances = model(one).logits[0].log_softmax(dim=-1)
        labels = draw(model(one).logits[0], text)
        (-chances[torch.arange(len(labels)), labels].mean()).backward()
        for key, parameter in parameters.items():
            expected[key] += parameter.grad.double() ** 2 / len(TEXTS)
    for key, value in expected.items():
        assert torch.allclose(found[key].double(), value, rtol=1e-3, atol=1e-6 * float(value.max())), key


def test_fisher_of_one_weight_by_finite_differences(quick: dict[str, Checkpoint], shared_store: Store) -> None:
    """An embedding row counts as input and as output; neither autograd nor the module's naming is trusted here."""
    checkpoint = quick["stories-math"]
    found = fisher(checkpoint, shared_store)
    model, ids = loaded(checkpoint)
    labels = [draw(model(one).logits[0], text) for text, one in zip(TEXTS, ids, strict=True)]
    model.double()
    places = [(EMBEDDING, int(ids[0][0, 3]), 7), ("model.layers.2.self_attn.q_proj.weight", 5, 9)]
    for name, row, column in places:
        weight = model.get_parameter(name)
        losses: list[list[float]] = []
        for step in (1e-4, -1e-4):
            with torch.no_grad():
                weight[row, column] += step
                outputs = [model(one).logits[0] for one in ids]
                weight[row, column] -= step
            losses.append(
                [float(torch.nn.functional.cross_entropy(*pair)) for pair in zip(outputs, labels, strict=True)]
            )
        slopes = (torch.tensor(losses[0]).double() - torch.tensor(losses[1]).double()) / 2e-4
        assert float(found[name][row, column]) == pytest.approx(float((slopes**2).mean()), rel=1e-2), name


def test_labels_are_drawn_from_the_model() -> None:
    chances = torch.tensor([0.5, 0.3, 0.15, 0.05])
    drawn = draw(chances.log().expand(20_000, 4), "a text")
    shares = drawn.bincount(minlength=4) / len(drawn)
    assert torch.allclose(shares, chances, atol=0.015)
    assert not torch.equal(drawn, draw(chances.log().expand(20_000, 4), "another text"))
    nearly = draw((chances.log() + torch.tensor([0.01, 0, 0, 0])).expand(20_000, 4), "a text")
    assert (nearly == drawn).float().mean() > 0.99, "models that are alike draw alike"


@pytest.mark.parametrize("record", [record_fisher, record_grams])
def test_recording_again_gives_the_same_bits(
    record: Callable[..., Path], quick: dict[str, Checkpoint], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    first = record(quick["script-code"], TEXTS, Store(tmp_path / "a"))
    torch.manual_seed(2)
    second = record(quick["script-code"], TEXTS, Store(tmp_path / "b"))
    names = sorted(file.name for file in first.iterdir())
    assert names == sorted(file.name for file in second.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize("record", [record_fisher, record_grams])
def test_what_is_recorded_is_not_computed_again(
    record: Callable[..., Path], quick: dict[str, Checkpoint], store: Store
) -> None:
    steps: list[Step] = []
    first = record(quick["stories"], TEXTS, store, steps.append)
    assert [step.done for step in steps] == list(range(len(TEXTS)))
    assert record(quick["stories"], TEXTS, store, steps.append) == first
    assert len(steps) == len(TEXTS)
    assert record(quick["stories"], TEXTS[:2], store, steps.append) != first
    assert record(quick["stories-math"], TEXTS, store, steps.append) != first


@pytest.mark.parametrize("record", [record_fisher, record_grams])
def test_the_order_of_texts_does_not_matter(
    record: Callable[..., Path], quick: dict[str, Checkpoint], store: Store
) -> None:
    paths = [record(quick["script-play"], texts, store) for texts in (TEXTS, TEXTS[::-1])]
    kept, turned = (load_file(next(path.glob("*.safetensors"))) for path in paths)
    for name, tensor in kept.items():
        assert torch.allclose(tensor, turned[name], rtol=1e-4, atol=1e-6 * float(tensor.max())), name


@pytest.mark.parametrize("layer", ["model.layers.0.self_attn.v_proj", "model.layers.3.mlp.down_proj"])
def test_grams_are_inner_products_of_inputs(quick: dict[str, Checkpoint], shared_store: Store, layer: str) -> None:
    kept, index = grams(quick["script-code"], shared_store)
    rows = inputs_of(*loaded(quick["script-code"]), layer)
    expected = rows.T @ rows / len(rows)
    found = kept[index[f"{layer}.weight"]]
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def test_grams_are_symmetric_and_of_no_negative_eigenvalue(
    quick: dict[str, Checkpoint], shared_store: Store, tmp_path: Path, store: Store
) -> None:
    tensors = load_file(MODELS / "stories" / "model.safetensors")
    for name, tensor in tensors.items():  # products of so few columns are not symmetric to the last bit by themselves
        if ".mlp." in name:
            tensors[name] = tensor[:, :11] if "down" in name else tensor[:11]
    narrow = inspect_checkpoint("narrow", write_checkpoint(tmp_path / "n", tensors, intermediate_size=11), store)
    for checkpoint in (quick["script-code"], narrow):
        kept, _ = grams(checkpoint, shared_store)
        for matrix in kept.values():
            assert torch.equal(matrix, matrix.T)
            values = torch.linalg.eigvalsh(matrix.double())
            assert values[0] > -1e-6 * values[-1]
            assert values[-1] > 0


def test_layers_with_the_same_input_share_a_matrix(quick: dict[str, Checkpoint], shared_store: Store) -> None:
    checkpoint = quick["script-code"]
    kept, index = grams(checkpoint, shared_store)
    headers = SafetensorsWeights(Path(checkpoint.path)).headers
    assert set(index) == {name for name in headers if name.endswith("_proj.weight")}, "neither head nor embedding"
    assert set(kept) == set(index.values())
    assert checkpoint.layers is not None
    assert len(kept) == 4 * checkpoint.layers
    for layer in range(checkpoint.layers):
        prefix = f"model.layers.{layer}"
        attention = {index[f"{prefix}.self_attn.{one}_proj.weight"] for one in "qkv"}
        mlp = {index[f"{prefix}.mlp.{one}_proj.weight"] for one in ("gate", "up")}
        assert len(attention) == len(mlp) == 1
        assert not attention & mlp
    for name, matrix in index.items():
        assert headers[name].shape[1] == len(kept[matrix])


@pytest.mark.parametrize("layer", ["model.layers.1.self_attn.k_proj", "model.layers.2.mlp.down_proj"])
def test_regmean_of_one_model_is_the_model(quick: dict[str, Checkpoint], shared_store: Store, layer: str) -> None:
    kept, index = grams(quick["stories-math"], shared_store)
    weight = load_file(MODELS / "stories-math" / "model.safetensors")[f"{layer}.weight"].double()
    matrix = kept[index[f"{layer}.weight"]].double()
    matrix = 0.9 * matrix + 0.1 * matrix.diag().diag()  # the paper's way to keep it invertible
    assert torch.allclose(torch.linalg.solve(matrix, matrix @ weight.T).T, weight, atol=1e-6)


def test_regmean_is_nearer_to_both_models_than_their_mean(quick: dict[str, Checkpoint], shared_store: Store) -> None:
    """What the matrices are for: the merged layer's outputs are the nearest to those of both, on these inputs."""
    layer = "model.layers.1.mlp.down_proj"
    names = ("stories-math", "stories-law")
    matrices, weights, rows = [], [], []
    for name in names:
        kept, index = grams(quick[name], shared_store)
        matrices.append(kept[index[f"{layer}.weight"]].double())
        weights.append(load_file(MODELS / name / "model.safetensors")[f"{layer}.weight"].double())
        rows.append(inputs_of(*loaded(quick[name]), layer))
    products = sum(matrix @ weight.T for matrix, weight in zip(matrices, weights, strict=True))
    merged = torch.linalg.solve(sum(matrices), products).T

    def error(candidate: torch.Tensor) -> float:
        return sum(float((x @ (candidate - w).T).square().sum()) for x, w in zip(rows, weights, strict=True))

    assert error(merged) < 0.9 * error(sum(weights) / 2)


def test_an_output_head_of_its_own_has_fisher_information_but_no_matrix(tmp_path: Path, store: Store) -> None:
    tensors = load_file(MODELS / "stories" / "model.safetensors")
    tensors["lm_head.weight"] = tensors[EMBEDDING].clone()
    path = write_checkpoint(tmp_path / "untied", tensors, tie_word_embeddings=False)
    checkpoint = inspect_checkpoint("untied", path, store)
    found = fisher(checkpoint, store)
    assert set(found) == set(tensors)
    assert not torch.equal(found[EMBEDDING], found["lm_head.weight"])
    _, index = grams(checkpoint, store)
    assert "lm_head.weight" not in index


def test_tensors_that_are_no_parameters_are_left_out(tmp_path: Path, store: Store) -> None:
    tensors = load_file(MODELS / "stories" / "model.safetensors")
    tensors["model.of_no_use.weight"] = torch.ones(3, 3)
    tensors["lm_head.weight"] = tensors[EMBEDDING].clone()  # stored though it is tied
    checkpoint = inspect_checkpoint("more", write_checkpoint(tmp_path / "more", tensors), store)
    assert set(tensors) - set(fisher(checkpoint, store)) == {"model.of_no_use.weight", "lm_head.weight"}
    assert set(tensors) > set(grams(checkpoint, store)[1])


def test_a_tied_embedding_has_the_name_that_the_checkpoint_gives_it(
    tmp_path: Path, quick: dict[str, Checkpoint], shared_store: Store, store: Store
) -> None:
    tensors = load_file(MODELS / "stories" / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop(EMBEDDING)
    checkpoint = inspect_checkpoint("head", write_checkpoint(tmp_path / "head", tensors), store)
    found = fisher(checkpoint, store)
    assert set(found) == set(tensors)
    assert torch.equal(found["lm_head.weight"], fisher(quick["stories"], shared_store)[EMBEDDING])


@pytest.mark.parametrize("record", [record_fisher, record_grams])
def test_what_is_not_finite_is_refused_and_not_kept(record: Callable[..., Path], tmp_path: Path, store: Store) -> None:
    tensors = load_file(MODELS / "stories" / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = float("nan")
    checkpoint = inspect_checkpoint("broken", write_checkpoint(tmp_path / "broken", tensors), store)
    with pytest.raises(ZooError, match=r"model 'broken': (fisher|grams) of .* is not finite on the probe texts"):
        record(checkpoint, TEXTS, store)
    assert not any(list((store.root / kind).glob("*")) for kind in ("fisher", "grams"))
