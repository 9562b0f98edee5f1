"""What the tensors of a transformer are for, by the names that model classes give them."""

import re
from typing import Literal

ModuleKind = Literal["attention", "mlp", "embeddings", "norms", "other"]

_PATTERNS: tuple[tuple[ModuleKind, str], ...] = (
    ("norms", r"(norm\w*|ln_\w+|ln\d*|layernorm\w*)(\.\d+)?\.(weight|bias)$"),
    ("embeddings", r"(^|\.)(embed\w*|wte|wpe|lm_head|word_embeddings\w*|output|shared)\.(weight|bias)$"),
    ("attention", r"(attn|attention|q_proj|k_proj|v_proj|o_proj|qkv|query_key_value|c_attn)"),
    ("mlp", r"(mlp|feed_forward|ffn|experts?\b|block_sparse_moe|fc1|fc2|dense_h|dense_4h|gate_proj|up_proj|down_proj)"),
)
_VOCABULARY = re.compile(
    r"(^|\.)(embed_tokens|embed_in|embed_out|wte|lm_head|word_embeddings|output|shared)\.(weight|bias)$"
)
_INPUT_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|embed_in|wte|wpe|word_embeddings\w*|embed_positions)\.(weight|bias)$"
)
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")


def kind_of(name: str) -> ModuleKind:
    """Return what a tensor is for."""
    for kind, pattern in _PATTERNS:
        if re.search(pattern, name):
            return kind
    return "other"


def is_vocabulary(name: str) -> bool:
    """Return whether a tensor has a row for each token."""
    return bool(_VOCABULARY.search(name))


def is_input_embedding(name: str) -> bool:
    """Return whether a tensor turns tokens or positions into what the first layer reads."""
    return bool(_INPUT_EMBEDDING.search(name))


def layer_of(name: str) -> int | None:
    """Return the number of the layer a tensor is in, or None for embeddings, final norm and head."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def in_layer(name: str, layer: int) -> str:
    """Return the name that a layer's tensor has in another layer."""
    found = _LAYER.search(name)
    return name if found is None else f"{name[: found.start(1)]}{layer}{name[found.end(1) :]}"


def layer_prefix(name: str) -> str:
    """Return what the names of all tensors of a layer begin with, up to the dot after its number."""
    found = _LAYER.search(name)
    return name[: found.end()] if found else ""
