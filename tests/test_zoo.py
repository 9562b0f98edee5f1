"""Inspection: headers only, and one clear line for whatever is wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from composer.artefacts import Store
from composer.errors import ZooError
from composer.merging.smoke import smoke_check
from composer.serving.engines import ENGINES
from composer.similarity import compare
from composer.zoo import Zoo, inspect_checkpoint, inspect_zoo, read_headers, read_rows
from composer.zoo.settings import ModelEntry, ZooSection
from tests.conftest import MODELS


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of a real model, to be spoiled."""
    return Path(shutil.copytree(MODELS / "stories", tmp_path / "model"))


def refusal(path: Path, store: Store, **options: bool) -> str:
    with pytest.raises(ZooError) as caught:
        inspect_checkpoint("m", path, store, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_checkpoint_is_described_from_headers(model: Path, store: Store) -> None:
    found = inspect_checkpoint("m", model, store)
    state = load_file(model / "model.safetensors")
    assert found.architecture == "LlamaForCausalLM"
    assert found.parameters == sum(tensor.numel() for tensor in state.values())
    assert found.dtype == "BF16"
    assert found.vocabulary_size == 512
    assert found.context_length == 512
    headers = read_headers(model)
    assert {name: header.shape for name, header in headers.items()} == {n: tuple(t.shape) for n, t in state.items()}


def test_shards_are_read_as_one(model: Path, store: Store) -> None:
    whole = inspect_checkpoint("m", model, store)
    state = load_file(model / "model.safetensors")
    names = sorted(state)
    half = len(names) // 2
    for number, part in enumerate((names[:half], names[half:]), start=1):
        save_file({name: state[name] for name in part}, model / f"model-0000{number}-of-00002.safetensors")
    (model / "model.safetensors").unlink()
    index = {n: f"model-0000{1 if n in names[:half] else 2}-of-00002.safetensors" for n in names}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    sharded = inspect_checkpoint("m", model, store)
    assert sharded.shapes_hash == whole.shapes_hash
    assert sharded.parameters == whole.parameters
    assert sharded.content_hash != whole.content_hash
    (model / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors: this shard is named by" in refusal(model, store)


@pytest.mark.parametrize("block", [1, 7, 1000, 1 << 20])
def test_blocks_of_rows_put_together_are_the_tensor(model: Path, block: int) -> None:
    headers = read_headers(model)
    for name, tensor in load_file(model / "model.safetensors").items():
        assert torch.equal(torch.cat(list(read_rows(headers, name, block))), tensor)


def test_the_content_hash_follows_the_content(model: Path, store: Store) -> None:
    before = inspect_checkpoint("m", model, store)
    assert inspect_checkpoint("other-name", model, store).content_hash == before.content_hash
    state = load_file(model / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"] + 1
    save_file(state, model / "model.safetensors")
    after = inspect_checkpoint("m", model, store)
    assert after.content_hash != before.content_hash
    assert after.shapes_hash == before.shapes_hash


def test_a_missing_path(tmp_path: Path, store: Store) -> None:
    assert "absent does not exist" in refusal(tmp_path / "absent", store)


def test_a_file_instead_of_a_directory(model: Path, store: Store) -> None:
    assert "is a file; give the directory" in refusal(model / "config.json", store)


def test_a_directory_without_weights(model: Path, store: Store) -> None:
    (model / "model.safetensors").unlink()
    assert "no weights (*.safetensors)" in refusal(model, store)
    (model / "config.json").unlink()
    assert "no weights (*.safetensors)" in refusal(model, store)


def test_a_truncated_file(model: Path, store: Store) -> None:
    file = model / "model.safetensors"
    whole = file.read_bytes()
    for length in (len(whole) - 1, 1000, 8, 3, 0):
        file.write_bytes(whole[:length])
        assert f"{file}: truncated" in refusal(model, store)


def test_a_file_of_another_kind(model: Path, store: Store) -> None:
    (model / "model.safetensors").write_bytes((4).to_bytes(8, "little") + b"nope" + b"rest")
    assert "not a safetensors file" in refusal(model, store)


def test_pickle_only_weights_are_refused(model: Path, store: Store) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    message = refusal(model, store)
    assert "only pickle weights (pytorch_model.bin), which can run code when opened" in message


def test_remote_code_is_refused_unless_allowed(model: Path, store: Store) -> None:
    (model / "mine.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "class MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )
    config = json.loads((model / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "architectures": ["MineForCausalLM"],
        "auto_map": {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"},
    }
    (model / "config.json").write_text(json.dumps(config))
    assert "needs Python code of its own" in refusal(model, store)
    allowed = inspect_checkpoint("m", model, store, trust_remote_code=True)
    assert allowed.remote_code
    assert smoke_check(allowed, [allowed]) is None, "what the recipe allows is loaded"
    assert "vLLM cannot be relied on" in (ENGINES.get("vllm").unsupported(allowed) or "")


def test_no_tokenizer(model: Path, store: Store) -> None:
    (model / "tokenizer.json").unlink()
    assert "no tokenizer.json" in refusal(model, store)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_name_file_and_tensor(model: Path, store: Store, value: float) -> None:
    state = load_file(model / "model.safetensors")
    state["model.layers.2.mlp.up_proj.weight"][3, 4] = value
    save_file(state, model / "model.safetensors")
    zoo = Zoo(members=(inspect_checkpoint("m", model, store),))
    with pytest.raises(ZooError, match=r"model 'm': .*model.safetensors: tensor model.layers.2.mlp.up_proj.weight"):
        compare(zoo)


def test_a_zoo_keeps_order_examples_and_base(store: Store) -> None:
    section = ZooSection(
        models=[
            ModelEntry(id="b", model=str(MODELS / "stories-math"), examples=["1 + 1?"]),
            ModelEntry(id="a", model=str(MODELS / "stories-web")),
        ],
        base=str(MODELS / "stories"),
    )
    zoo = inspect_zoo(section, store)
    assert zoo.ids == ("b", "a")
    assert zoo.examples["b"] == ("1 + 1?",)
    assert zoo.base is not None
    assert zoo.base.id == "base"
