"""The smoke check: is a merged checkpoint a working language model at all?"""

import math
from functools import lru_cache
from pathlib import Path

from composer.artefacts import Store
from composer.errors import first_line
from composer.merging.plan import Smoke
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

OPENING = "Once upon a time"
SAMPLE = 24
"""Tokens of the sample."""

_ELEMENTS = 1 << 20


def smoke_check(merged: Checkpoint, inputs: list[Checkpoint], store: Store) -> Smoke:
    """Load a merged checkpoint and look whether it works, or return what was found before.

    It must have finite weights, load, give finite logits, and not have lost the language: its perplexity on a
    few plain texts stays below `EXPLOSION` times the worst of its inputs.
    """
    known = store.path("smoke", merged.content_hash + ".json")
    if known.is_file():
        return Smoke.load(known)
    found = _check(merged, inputs)
    found.save(known)
    return found


def _check(merged: Checkpoint, inputs: list[Checkpoint]) -> Smoke:
    import torch

    weights = SafetensorsWeights(Path(merged.path))
    for name in weights.headers:
        for block in read_blocks(weights, name, _ELEMENTS):
            if not torch.isfinite(block).all():
                return Smoke(problem=f"tensor {name} holds NaN or infinite values")
    try:
        perplexity, sample = _try(merged.content_hash, merged.path, merged.remote_code)
    except Exception as error:  # transformers raises whatever a broken checkpoint makes it stumble over
        return Smoke(problem=f"transformers cannot load it: {first_line(error)}")
    if not math.isfinite(perplexity):
        return Smoke(problem="its logits are not finite")
    each = {one.id: _try(one.content_hash, one.path, one.remote_code)[0] for one in inputs}
    worst = max(each.values())
    exploded = perplexity > EXPLOSION * worst
    problem = f"its perplexity exploded: {perplexity:.3g}, against {worst:.3g} for the worst input"
    return Smoke(problem=problem if exploded else None, perplexity=perplexity, inputs=each, sample=sample)


@lru_cache(maxsize=256)
def _try(content_hash: str, path: str, remote_code: bool) -> tuple[float, str]:
    """Return exp of the mean next-token loss (nats) over `TEXTS`, and a greedy continuation of `OPENING`.

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
        if not math.isfinite(loss):
            return math.inf, ""
        opening = tokenizer(OPENING, return_tensors="pt")
        written = model.generate(**opening, max_new_tokens=SAMPLE, do_sample=False, pad_token_id=0)
    return math.exp(min(loss / tokens, 700.0)), tokenizer.decode(written[0], skip_special_tokens=True)
