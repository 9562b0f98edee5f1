"""GGUF files: read as transformers reads them, a tensor at a time, and marked as dequantised ever after."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from composer.artefacts import Store
from composer.errors import ZooError
from composer.merging.engine.export import export
from composer.merging.engine.merge import Merge
from composer.merging.engine.shelf import Shelf
from composer.merging.plan import MergeStep
from composer.similarity import compare
from composer.zoo import ModelReference, Zoo, inspect_checkpoint, make_whole, open_weights
from tests.conftest import MODELS

BASE = MODELS / "stories"
HEADS = 8
TYPES = {"Q8_0": gguf.GGMLQuantizationType.Q8_0, "Q4_1": gguf.GGMLQuantizationType.Q4_1, "F16": None}
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(file: Path, kind: str = "Q8_0", source: Path = BASE) -> Path:
    """Convert the quickstart's base to GGUF, as llama.cpp's converter does: names, layout of q and k, tokenizer."""
    config = AutoModelForCausalLM.from_pretrained(source).config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("stories")
    writer.add_license("mit")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("llama")
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_scores([-float(place) for place in range(len(tokens))])
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for name, tensor in load_file(source / "model.safetensors").items():
        values = tensor.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            rows, columns = values.shape
            values = values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        short = name
        for theirs, ours in NAMES.items():
            short = short.replace(theirs, ours)
        short = short.replace("model.layers.", "blk.")
        quantised = TYPES[kind]
        if values.ndim == 1:
            writer.add_tensor(short, values)
        elif quantised is None or values.shape[1] % 32:  # rows that make no whole blocks stay as they are
            writer.add_tensor(short, values.astype(np.float16))
        else:
            writer.add_tensor(short, gguf.quantize(values, quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("kind", TYPES)
def test_it_is_read_as_transformers_reads_it(tmp_path: Path, store: Store, kind: str) -> None:
    file = write_gguf(tmp_path / "m.gguf", kind)
    found = inspect_checkpoint("m", file, store)
    assert found.architecture == "LlamaForCausalLM"
    assert found.licence == "mit"
    assert found.dequantised_from == (kind if TYPES[kind] else None)
    assert found.dtype == ("BF16" if TYPES[kind] else "F16")
    weights = open_weights(found.source, Path(found.home))
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).state_dict()
    original = load_file(BASE / "model.safetensors")
    for name, header in weights.headers.items():
        tensor = weights.read(name, 0, header.rows)
        assert torch.equal(tensor, expected[name].to(tensor.dtype))
        distance = (tensor.float() - original[name].float()).norm() / original[name].float().norm()
        assert distance < {"F16": 0.001, "Q8_0": 0.01, "Q4_1": 0.15}[kind], name


def test_written_out_it_is_the_same_model(tmp_path: Path, store: Store) -> None:
    found = inspect_checkpoint("m", write_gguf(tmp_path / "m.gguf"), store)
    make_whole(found, store)
    whole = AutoModelForCausalLM.from_pretrained(found.path, dtype=torch.float32)
    ids = torch.tensor([[1, 300, 301, 302, 17]])
    original = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    with torch.inference_mode():
        gap = (whole(ids).logits.log_softmax(-1) - original(ids).logits.log_softmax(-1)).abs().mean()
    assert gap < 0.05
    described = inspect_checkpoint("m", Path(found.path), store)
    assert described.shapes_hash == found.shapes_hash
    assert described.settings == found.settings


def test_it_is_compared_and_merged_with_what_it_came_from(tmp_path: Path, store: Store) -> None:
    plain = inspect_checkpoint("plain", BASE, store)
    found = inspect_checkpoint("m", write_gguf(tmp_path / "m.gguf"), store)
    assert found.shapes_hash == plain.shapes_hash
    assert found.settings == plain.settings, "single-precision numbers and other key names are the same settings"
    value = compare(Zoo(members=(plain, found)), store).between("plain", "m")
    assert value is not None
    assert 0.999 < value < 1
    make_whole(found, store)
    other = inspect_checkpoint("m2", Path(found.path), store)
    step = MergeStep(name="merged", operator="linear", inputs=("m", "m2"))
    merged = export(Merge(step, [found, other], None, Shelf()), "merged", store)
    assert merged.lineage is not None
    assert merged.lineage.dequantised == {"m": "Q8_0"}


def test_a_directory_of_gguf_files(tmp_path: Path, store: Store) -> None:
    write_gguf(tmp_path / "a.gguf")
    assert inspect_checkpoint("m", tmp_path, store).dequantised_from == "Q8_0"
    write_gguf(tmp_path / "b.gguf", "Q4_1")
    with pytest.raises(ZooError, match=r"holds several GGUF files; name one with file: \(a.gguf, b.gguf\)"):
        inspect_checkpoint("m", tmp_path, store)
    assert inspect_checkpoint("m", ModelReference(model=str(tmp_path), file="b.gguf"), store).dequantised_from == "Q4_1"
    with pytest.raises(ZooError, match=r"has no file 'c.gguf' \(its GGUF files: a.gguf, b.gguf\)"):
        inspect_checkpoint("m", ModelReference(model=str(tmp_path), file="c.gguf"), store)


def test_a_corrupt_file_is_one_line(tmp_path: Path, store: Store) -> None:
    whole = write_gguf(tmp_path / "m.gguf").read_bytes()
    for name, content in (
        ("cut-in-the-data", whole[:-5000]),
        ("cut-in-the-header", whole[:3000]),
        ("empty", b""),
        ("other", b"nothing of the kind" * 100),
        ("overwritten", whole[:24] + b"\xff" * 400 + whole[424:]),
    ):
        file = tmp_path / f"{name}.gguf"
        file.write_bytes(content)
        with pytest.raises(ZooError, match=f"{name}.gguf") as caught:
            inspect_checkpoint("m", file, store)
        assert "\n" not in str(caught.value)
        assert "download it again" in str(caught.value)


def test_an_architecture_that_transformers_cannot_read(tmp_path: Path, store: Store) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "unheard-of")
    writer.add_name("m")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ZooError, match=r"m.gguf: transformers cannot read this GGUF file: .*unheard-of"):
        inspect_checkpoint("m", tmp_path / "m.gguf", store)


def test_a_merge_takes_the_original_tokenizer_and_says_what_differs(tmp_path: Path, store: Store) -> None:
    plain = inspect_checkpoint("plain", BASE, store)
    found = inspect_checkpoint("m", write_gguf(tmp_path / "m.gguf"), store)
    assert found.tokenizer.merges != plain.tokenizer.merges, "this file holds scores, from which merges are rebuilt"
    matrix = compare(Zoo(members=(plain, found)), store)
    assert matrix.gate("plain", "m") is None
    assert "merges rebuilt from a GGUF file" in (matrix.note("plain", "m") or "")
    make_whole(found, store)
    step = MergeStep(name="x", operator="linear", inputs=("m", "plain"))
    merged = export(Merge(step, [found, plain], None, Shelf()), "x", store)
    assert merged.tokenizer == plain.tokenizer
