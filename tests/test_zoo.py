"""Inspection: headers only, and one clear line for whatever is wrong."""

import json
import shutil
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from composer.artefacts import Store
from composer.errors import ZooError
from composer.merging.smoke import smoke_check
from composer.serving.engines import ENGINES
from composer.similarity import compare
from composer.zoo import SafetensorsWeights, Zoo, describe, inspect_checkpoint, inspect_zoo, read_blocks, read_headers
from composer.zoo.settings import ModelEntry, ZooSection
from tests.conftest import MODELS, Cli


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
    weights = SafetensorsWeights(model)
    for name, tensor in load_file(model / "model.safetensors").items():
        assert torch.equal(torch.cat(list(read_blocks(weights, name, block))), tensor)


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


def test_a_file_of_a_kind_nobody_knows(model: Path, store: Store) -> None:
    assert "config.json is a file of a kind nobody here knows" in refusal(model / "config.json", store)


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
    assert smoke_check(allowed, [allowed], store).problem is None, "what the recipe allows is loaded"
    assert "vLLM cannot be relied on" in (ENGINES.get("vllm").unsupported(allowed) or "")


def test_no_tokenizer(model: Path, store: Store) -> None:
    (model / "tokenizer.json").unlink()
    assert "no tokenizer.json" in refusal(model, store)


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


def test_an_index_that_names_what_a_shard_does_not_hold(model: Path, store: Store) -> None:
    names = sorted(load_file(model / "model.safetensors"))
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys([*names, "model.extra.weight"], "model.safetensors")}))
    assert "model.safetensors: tensor model.extra.weight is not in it" in refusal(model, store)


def test_a_tensor_in_two_shards(model: Path, store: Store) -> None:
    state = load_file(model / "model.safetensors")
    save_file({"model.norm.weight": state["model.norm.weight"]}, model / "model-2.safetensors")
    assert "tensor model.norm.weight is also in" in refusal(model, store)


def test_a_header_whose_shape_does_not_fit_its_bytes(model: Path, store: Store) -> None:
    file = model / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["model.norm.weight"]["shape"] = [7]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    file.write_bytes(content[:8] + text + content[8 + length :])
    assert "tensor model.norm.weight has" in refusal(model, store)


def test_a_hundred_billion_parameters_are_described_from_headers(tmp_path: Path, store: Store) -> None:
    """400 shards of empty, sparse files, 200 GB to whoever reads them: only headers are read."""
    directory = tmp_path / "giant"
    shutil.copytree(MODELS / "stories", directory)
    (directory / "model.safetensors").unlink()
    layers, hidden, inner, shards = 100, 8192, 34000, 400
    index = {}
    for number in range(shards):
        layer, quarter = divmod(number, 4)
        names = [
            {f"model.layers.{layer}.self_attn.{part}_proj.weight": (hidden, hidden) for part in "qkvo"},
            *({f"model.layers.{layer}.mlp.{part}_proj.weight": (inner, hidden)} for part in ("gate", "up", "down")),
        ][quarter]
        entries, end = {}, 0
        for name, (rows, columns) in names.items():
            entries[name] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [end, end + 2 * rows * columns]}
            end += 2 * rows * columns
        header = json.dumps(entries).encode()
        file = directory / f"model-{number + 1:05}-of-{shards:05}.safetensors"
        with file.open("wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            stream.truncate(8 + len(header) + end)
        index |= dict.fromkeys(entries, file.name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    before = psutil.Process().io_counters().read_chars
    found = describe("giant", directory, store)
    assert psutil.Process().io_counters().read_chars - before < 10_000_000
    assert found.parameters == layers * (4 * hidden**2 + 3 * hidden * inner) > 1e11
    assert found.files == shards


def test_broken_models_are_skipped_where_the_recipe_says_so(model: Path, store: Store) -> None:
    (model / "model.safetensors").write_bytes(b"broken")
    entries = [ModelEntry(id="good", model=str(MODELS / "stories")), ModelEntry(id="bad", model=str(model))]
    with pytest.raises(ZooError, match="truncated"):
        inspect_zoo(ZooSection(models=entries), store)
    zoo = inspect_zoo(ZooSection(models=entries, on_error="skip"), store)
    assert zoo.ids == ("good",)
    assert "truncated" in zoo.skipped["bad"]
    without = inspect_zoo(ZooSection(models=entries[:1], base=str(model), on_error="skip"), store)
    assert without.base is None
    assert "truncated" in without.skipped["base"]
    with pytest.raises(ZooError, match=r"no model of the zoo can be used; the first: .*truncated"):
        inspect_zoo(ZooSection(models=entries[1:], on_error="skip"), store)


def test_a_quantised_checkpoint_is_described_and_never_compared(model: Path, store: Store, cli: Cli) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    quantised = inspect_checkpoint("q", model, store)
    plain = inspect_checkpoint("p", MODELS / "stories", store)
    assert quantised.quantisation == "gptq"
    matrix = compare(Zoo(members=(plain, quantised)), store)
    assert matrix.between("p", "q") is None
    assert matrix.gate("p", "q") == "q is stored quantised (gptq)"


def test_inspect_shows_models_and_what_is_wrong(model: Path, cli: Cli) -> None:
    result = cli("inspect", str(MODELS / "stories"), str(MODELS / "script-play"))
    assert result.returncode == 0, result.stderr
    assert "LlamaForCausalLM" in result.stdout
    assert "Qwen2ForCausalLM" in result.stdout
    (model / "model.safetensors").write_bytes(b"")
    result = cli("inspect", "--json", "--hash", str(MODELS / "stories"), str(model), str(model / "absent"))
    assert result.returncode == 3
    found = json.loads(result.stdout)
    assert [one["id"] for one in found["models"]] == [str(MODELS / "stories")]
    assert len(found["models"][0]["content_hash"]) == 64
    assert "truncated" in found["failed"][str(model)]
    assert "does not exist" in found["failed"][str(model / "absent")]
