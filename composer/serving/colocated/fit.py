"""Whether checkpoints can share an engine."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from composer.zoo.checkpoint import Checkpoint

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
"""Those whose layers are built of the parts that `model.py` runs, no more and no less."""

MOST = 256
"""Experts in one engine: an index travels beside the activations, and bfloat16 holds whole numbers exactly so far."""

_OTHER_ATTENTION = ("dual_chunk_attention_config", "llama_4_scaling", "ada_rms_norm_t_cond", "qk_norm")
"""Settings with which layers of these architectures have parts that `model.py` does not run."""

_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens", "eos_token_id")
"""What vLLM takes from the first checkpoint's generation_config.json, else from its config.json, for all requests."""

_SAME: tuple[tuple[str, Callable[[Checkpoint], object]], ...] = (
    ("architecture", lambda one: one.architecture),
    ("layers", lambda one: one.layers),
    ("hidden size", lambda one: one.hidden_size),
    ("heads", lambda one: one.heads),
    ("key-value heads", lambda one: one.kv_heads),
    ("head size", lambda one: _head_size(one)),
    ("intermediate size", lambda one: one.intermediate_size),
    ("vocabulary size", lambda one: one.vocabulary_size),
)

_SAME_READING: tuple[tuple[str, Callable[[Checkpoint], object]], ...] = (
    ("vocabulary", lambda one: one.tokenizer.vocabulary),
    ("merges", lambda one: one.tokenizer.merges),
    ("added tokens", lambda one: one.tokenizer.added_tokens),
    ("special tokens", lambda one: one.tokenizer.special_tokens),
    ("chat template", lambda one: one.tokenizer.chat_template),
    ("treatment of texts", lambda one: _reading(one)),
)


def obstacle(checkpoints: Sequence[Checkpoint], dtype: str = "auto") -> str | None:
    """Return why checkpoints cannot share an engine, or None if they can.

    Experts may differ in what each keeps for itself: weights, RoPE, the norms' epsilon, whether the output head is
    the embedding, the longest sequence.

    Args:
        checkpoints: The experts; one that cannot be co-located is named.
        dtype: What the engine computes in; with `auto` that is the first one's, so all must be stored in it.
    """
    if len(checkpoints) > MOST:
        return f"{len(checkpoints)} experts are more than the {MOST} that one engine tells apart"
    for one in checkpoints:
        reason = _alone(one)
        if reason is not None:
            return f"'{one.id}' {reason}"
    first = checkpoints[0]
    for other in checkpoints[1:]:
        for name, read in _SAME:
            if read(first) != read(other):
                return f"'{first.id}' and '{other.id}' differ in {name}: {read(first)} and {read(other)}"
        for name, read in _SAME_READING:
            if read(first) != read(other):
                return f"'{first.id}' and '{other.id}' have tokenizers that differ in {name}"
        if dtype == "auto" and first.dtype != other.dtype:
            return f"'{first.id}' and '{other.id}' are stored in {first.dtype} and {other.dtype}; set serve.dtype"
        for name in _DEFAULTS:
            if _default(first, name) != _default(other, name):
                return (
                    f"'{first.id}' and '{other.id}' differ in the default of {name}: "
                    f"{_default(first, name)} and {_default(other, name)}"
                )
    return None


def _alone(one: Checkpoint) -> str | None:
    """Return what of a checkpoint itself keeps it from being co-located."""
    if one.architecture not in ARCHITECTURES:
        return f"is a {one.architecture}; engines are shared by {', '.join(ARCHITECTURES)} only"
    if one.remote_code:
        return "brings Python code of its own"
    if one.quantisation is not None:
        return f"is quantised ({one.quantisation})"
    config = _json(one.home, "config.json")
    if _slides(config, one.architecture):
        return "attends through a sliding window"
    odd = [name for name in _OTHER_ATTENTION if config.get(name)]
    if odd or config.get("is_causal") is False:
        return f"has layers of another kind ({', '.join(odd) or 'is_causal: false'} in its config.json)"
    return None


def _slides(config: dict[str, Any], architecture: str) -> bool:
    """Return whether any layer looks through a sliding window."""
    if config.get("layer_types"):
        return "sliding_attention" in config["layer_types"]
    if architecture == "MistralForCausalLM":
        return config.get("sliding_window") is not None
    return bool(config.get("use_sliding_window"))


def _head_size(one: Checkpoint) -> int | None:
    size = _json(one.home, "config.json").get("head_dim")
    if size is None and one.hidden_size and one.heads:
        return one.hidden_size // one.heads
    return size


def _default(one: Checkpoint, name: str) -> object:
    return (_json(one.home, "generation_config.json") or _json(one.home, "config.json")).get(name)


def _reading(one: Checkpoint) -> object:
    """Return how a text is brought into form before it is looked up in the vocabulary, and what is put around it."""
    tokenizer, config = (_json(one.tokenizer_home, name) for name in ("tokenizer.json", "tokenizer_config.json"))
    parts = [tokenizer.get(name) for name in ("normalizer", "pre_tokenizer", "post_processor")]
    return [*parts, config.get("add_bos_token"), config.get("add_eos_token")]


def _json(home: str, name: str) -> dict[str, Any]:
    file = Path(home) / name
    return dict(json.loads(file.read_text())) if file.is_file() else {}
