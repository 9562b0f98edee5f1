"""Adapters: folded lazily, tensor by tensor, to what PEFT itself makes of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from composer.artefacts import Store
from composer.errors import ZooError
from composer.similarity import SignalSection, compare
from composer.zoo import ModelReference, Zoo, inspect_checkpoint, inspect_zoo, make_whole, open_weights
from composer.zoo.settings import ModelEntry, ZooSection
from tests.checkpoints import write_checkpoint
from tests.conftest import MODELS

BASE = MODELS / "stories"
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear", "lora_alpha": 3},
    "rslora": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "dora": {"target_modules": ["k_proj", "up_proj"], "use_dora": True},
    "patterns": {
        "target_modules": ["q_proj", "o_proj"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 2},
        "alpha_pattern": {"o_proj": 40},
    },
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
}


def make_adapter(directory: Path, base: Path = BASE, seed: int = 0, **options: Any) -> dict[str, torch.Tensor]:
    """Write a PEFT adapter with random factors; return the weights that PEFT folds it into, in float32."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.config._name_or_path = str(base)
    tuned = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 16, "task_type": "CAUSAL_LM", **options}))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    tuned.save_pretrained(directory)
    merged: dict[str, torch.Tensor] = tuned.merge_and_unload().state_dict()
    return merged


@pytest.mark.parametrize("kind", KINDS)
def test_folding_equals_peft(tmp_path: Path, store: Store, kind: str) -> None:
    expected = make_adapter(tmp_path / "adapter", **KINDS[kind])
    found = inspect_checkpoint("m", ModelReference(model=str(BASE), adapter=str(tmp_path / "adapter")), store)
    weights = open_weights(found.source, Path(found.home))
    changed = 0
    base = load_file(BASE / "model.safetensors")
    for name, header in weights.headers.items():
        tensor = torch.cat([weights.read(name, row, min(row + 7, header.rows)) for row in range(0, header.rows, 7)])
        assert torch.allclose(tensor.float(), expected[name].to(tensor.dtype).float(), rtol=1e-2, atol=1e-5), name
        changed += not torch.equal(tensor, base[name])
    assert changed


def test_folded_rows_and_the_written_checkpoint_are_the_same(tmp_path: Path, store: Store) -> None:
    expected = make_adapter(tmp_path / "adapter", **KINDS["all-linear"])
    found = inspect_checkpoint("m", ModelReference(model=str(BASE), adapter=str(tmp_path / "adapter")), store)
    assert not Path(found.path).exists(), "nothing is written before it is needed"
    make_whole(found, store)
    written = load_file(Path(found.path) / "model.safetensors")
    weights = open_weights(found.source, Path(found.home))
    for name, tensor in written.items():
        assert torch.equal(tensor, weights.read(name, 0, weights.headers[name].rows))
    again = inspect_checkpoint("m", Path(found.path), store)
    assert again.shapes_hash == found.shapes_hash
    model = AutoModelForCausalLM.from_pretrained(found.path, dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, expected[name], rtol=1e-2, atol=1e-5)


def test_a_directory_that_holds_only_an_adapter_finds_its_base(tmp_path: Path, store: Store) -> None:
    make_adapter(tmp_path / "adapter", **KINDS["plain"])
    alone = inspect_checkpoint("m", tmp_path / "adapter", store)
    both = inspect_checkpoint("m", ModelReference(model=str(BASE), adapter=str(tmp_path / "adapter")), store)
    assert alone.content_hash == both.content_hash
    assert alone.base_hint == str(BASE)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/nowhere/base"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ZooError, match=r"model 'm': /nowhere/base does not exist.*it is the base that the adapter"):
        inspect_checkpoint("m", tmp_path / "adapter", store)


def test_the_common_base_of_adapters_is_the_base_of_the_zoo(tmp_path: Path, store: Store) -> None:
    for seed in (0, 1):
        make_adapter(tmp_path / str(seed), seed=seed, **KINDS["all-linear"])
    entries = [ModelEntry(id=f"m{i}", model=str(BASE), adapter=str(tmp_path / str(i))) for i in (0, 1)]
    zoo = inspect_zoo(ZooSection(models=entries), store)
    assert zoo.base is not None
    assert zoo.base.path == str(BASE)
    assert "it is what the adapters of the zoo are for" in (zoo.base_reason or "")
    matrix = compare(zoo, store, SignalSection(signal="deltas"))
    assert abs(matrix.between("m0", "m1") or 1) < 0.2, "random adapters point in unrelated directions"
    plain = compare(Zoo(members=zoo.members), store).between("m0", "m1")
    assert plain is not None
    assert plain > 0.9


def test_an_adapter_for_another_base(tmp_path: Path, store: Store) -> None:
    make_adapter(tmp_path / "adapter", **KINDS["plain"])

    def refusal(base: Path) -> str:
        with pytest.raises(ZooError) as caught:
            inspect_checkpoint("m", ModelReference(model=str(base), adapter=str(tmp_path / "adapter")), store)
        return str(caught.value)

    small = {name: tensor[:8] for name, tensor in load_file(BASE / "model.safetensors").items()}
    message = refusal(write_checkpoint(tmp_path / "small", small))
    assert "lora_A" in message
    assert "of the base has" in message
    assert "the adapter is for another base" in message
    other = {name.replace("q_proj", "query"): tensor for name, tensor in load_file(BASE / "model.safetensors").items()}
    message = refusal(write_checkpoint(tmp_path / "other", other))
    assert "changes model.layers.0.self_attn.q_proj.weight, which the base does not have" in message


def test_what_is_no_lora_adapter(tmp_path: Path, store: Store) -> None:
    make_adapter(tmp_path / "adapter", **KINDS["plain"])
    reference = ModelReference(model=str(BASE), adapter=str(tmp_path / "adapter"))
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"peft_type": "IA3"}))
    with pytest.raises(ZooError, match="peft_type IA3 cannot be folded"):
        inspect_checkpoint("m", reference, store)
    file.write_text(json.dumps(config))
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    save_file(dict(list(tensors.items())[1:]), tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ZooError, match="has only one of its two factors"):
        inspect_checkpoint("m", reference, store)
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ZooError, match=r"no adapter_model.safetensors"):
        inspect_checkpoint("m", reference, store)
    file.unlink()
    with pytest.raises(ZooError, match=r"no adapter_config.json"):
        inspect_checkpoint("m", reference, store)


def test_an_adapter_that_is_not_finite_is_named(tmp_path: Path, store: Store) -> None:
    make_adapter(tmp_path / "adapter", **KINDS["plain"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(tensor for name, tensor in tensors.items() if "lora_B" in name)[0, 0] = float("nan")
    save_file(tensors, file)
    found = inspect_checkpoint("m", ModelReference(model=str(BASE), adapter=str(tmp_path / "adapter")), store)
    with pytest.raises(ZooError, match=r"model 'm': .*adapter_model.safetensors: tensor .* holds NaN or infinite"):
        compare(Zoo(members=(found,)), store)
