"""What tests of mixtures inside one model share: texts in batches, and what a model makes of them."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from composer.artefacts import Store
from composer.mixture.classes import register
from composer.zoo import Checkpoint, inspect_checkpoint
from tests.conftest import MODELS

TEXTS = (
    "What is 7 times 8?",
    "Once upon a time there was a little girl who",
    "The court may",
    "Plants make sugar from light, water and",
)
GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0}


def load(path: Path | str, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    register()
    return AutoModelForCausalLM.from_pretrained(path, **{"dtype": torch.float32, **options}).eval()


@dataclass
class Batch:
    ids: Tensor
    mask: Tensor

    def __getitem__(self, rows: Any) -> "Batch":
        return Batch(self.ids[rows], self.mask[rows])

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.ids, "attention_mask": self.mask}


def batch_of(*texts: str, side: str = "left", more: int = 0, like: str = "stories") -> Batch:
    """Tokenise texts, padded to the longest and by `more` tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODELS / like)
    rows = [tokenizer(text).input_ids for text in texts]
    width = max(map(len, rows)) + more
    ids, mask = torch.full((len(rows), width), 7), torch.zeros(len(rows), width, dtype=torch.long)
    for row, own in enumerate(rows):
        place = slice(width - len(own), width) if side == "left" else slice(0, len(own))
        ids[row, place], mask[row, place] = torch.tensor(own), 1
    return Batch(ids, mask)


def logits(model: Any, batch: Batch) -> list[Tensor]:
    """Return the logits of each text's own tokens."""
    with torch.inference_mode():
        found = model(**batch.inputs).logits
    return [row[mask.bool()] for row, mask in zip(found, batch.mask, strict=True)]


def answers(model: Any, batch: Batch, **options: Any) -> Tensor:
    """Return the tokens of answers, by default greedy ones, `[batch, 6]`."""
    found: Tensor = model.generate(**batch.inputs, **{**GREEDY, **options})
    return found[:, batch.ids.shape[1] :]


def close(first: list[Tensor], second: list[Tensor], tolerance: float = 1e-4) -> bool:
    return all(torch.allclose(a, b, atol=tolerance, rtol=0) for a, b in zip(first, second, strict=True))


def made_of(config: Any, directory: Path, store: Store, seed: int = 0) -> Checkpoint:
    """Write a tiny model of an architecture, with weights drawn at random."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MODELS / "stories" / name, directory / name)
    return inspect_checkpoint(directory.name, directory, store)


TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None, "initializer_range": 0.2,
}  # fmt: skip
