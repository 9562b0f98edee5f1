"""The smoke check: is a merged checkpoint a working language model at all?"""

import math
from functools import lru_cache
from pathlib import Path

from composer.zoo import Checkpoint, SafetensorsWeights, read_blocks

TEXTS = (
    "Once upon a time there was a little girl who lived near the woods with her mother.",
    "The committee will meet on Tuesday to discuss the budget for the coming year.",
    "def add(a, b):\n    return a + b\n",
    "If a box holds 12 apples and 5 are eaten, then 7 apples are left.",
)
"""Plain texts for a perplexity that tells a working model from a broken one, nothing finer."""

EXPLOSION = 4.0
"""A merge may be at most this many times as perplexed as the most perplexed of its inputs."""

_ELEMENTS = 1 << 20


def smoke_check(merged: Checkpoint, inputs: list[Checkpoint]) -> str | None:
    """Load a merged checkpoint and return what is wrong with it, or None.

    It must have finite weights, load, give finite logits, and not have lost the language: its perplexity on a
    few plain texts stays below `EXPLOSION` times the worst of its inputs.
    """
    import torch

    weights = SafetensorsWeights(Path(merged.path))
    for name in weights.headers:
        for block in read_blocks(weights, name, _ELEMENTS):
            if not torch.isfinite(block).all():
                return f"tensor {name} holds NaN or infinite values"
    perplexity = _perplexity(merged.content_hash, merged.path, merged.remote_code)
    if not math.isfinite(perplexity):
        return "its logits are not finite"
    worst = max(_perplexity(one.content_hash, one.path, one.remote_code) for one in inputs)
    if perplexity > EXPLOSION * worst:
        return f"its perplexity exploded: {perplexity:.3g}, against {worst:.3g} for the worst input"
    return None


@lru_cache(maxsize=256)
def _perplexity(content_hash: str, path: str, remote_code: bool) -> float:
    """Return exp of the mean next-token loss (nats) over `TEXTS`.

    Remembered by content: a search tries the same inputs again and again.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"local_files_only": True, "trust_remote_code": remote_code}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)
    tokenizer = AutoTokenizer.from_pretrained(path, **options)
    loss, tokens = 0.0, 0
    with torch.inference_mode():
        for text in TEXTS:
            ids = tokenizer(text, return_tensors="pt").input_ids
            predicted = ids.shape[1] - 1
            loss += float(model(ids, labels=ids).loss) * predicted
            tokens += predicted
    return math.exp(min(loss / tokens, 700.0)) if math.isfinite(loss) else math.inf
