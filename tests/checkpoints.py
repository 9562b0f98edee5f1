"""Checkpoints made for a test: any tensors, with the configuration and tokenizer of a real tiny model."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.conftest import MODELS

DESCRIPTION = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


def write_checkpoint(
    directory: Path,
    tensors: dict[str, torch.Tensor],
    *,
    shards: int = 1,
    like: Path = MODELS / "stories",
    **config: object,
) -> Path:
    """Write tensors as a Hugging Face directory; `config` overrides keys of config.json."""
    directory.mkdir(parents=True)
    for name in DESCRIPTION:
        if (like / name).is_file():
            shutil.copyfile(like / name, directory / name)
    if config:
        found = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(found | config))
    names = sorted(tensors)
    if shards == 1:
        save_file({name: tensors[name].contiguous() for name in names}, directory / "model.safetensors")
        return directory
    index = {}
    for number in range(shards):
        part = names[number::shards]
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name].contiguous() for name in part}, directory / file)
        index |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return directory


def add_tokens(directory: Path, *tokens: str) -> None:
    """Add tokens to a checkpoint's tokenizer, after those it has."""
    file = directory / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    known = max([*tokenizer["model"]["vocab"].values(), *(one["id"] for one in tokenizer["added_tokens"])])
    for place, token in enumerate(tokens, start=known + 1):
        entry = {"id": place, "content": token, "special": False}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokenizer["added_tokens"].append(entry | flags)
    file.write_text(json.dumps(tokenizer))


def write_sentence_encoder(directory: Path) -> Path:
    """Write a bidirectional encoder with random weights and the tokenizer of a real tiny model."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    tokenizer = AutoTokenizer.from_pretrained(MODELS / "stories")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    BertModel(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
