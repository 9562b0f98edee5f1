"""Gates of a mixture inside one model: what they are, and what they see."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

Level = Literal["block", "ffn"]
"""What a gate chooses between: whole decoder layers, or their feed-forward parts."""


@dataclass(frozen=True)
class Gates:
    """Linear gates: `logits = W x + b`."""

    weight: "Tensor"
    """`[sparse layers, experts, hidden]`; of a single layer if one gate decides for all."""
    bias: "Tensor | None" = None
    """`[sparse layers, experts]`; None for zeros."""


def gate_inputs(dense_path: str, texts: Sequence[str], level: Level, dense_layers: int = 0) -> "Tensor":
    """Return what the gates see of texts: the mean over a text's own tokens of a gate's input.

    It is read from the dense model, one text at a time, without BOS and chat template: the input of the layer (the
    residual stream) at block level, that of its feed-forward part (after the norm) at FFN level.

    Args:
        dense_path: The dense model's directory.
        texts: At least one.
        level: Where the gates are.
        dense_layers: The first layers, which have no gate.

    Returns:
        `[sparse layers, texts, hidden]`, float32.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    from routers.encoders import token_ids

    tokenizer = AutoTokenizer.from_pretrained(dense_path, local_files_only=True)
    model: Any = AutoModel.from_pretrained(dense_path, dtype=torch.float32, local_files_only=True).eval()
    layers = model.layers[dense_layers:]
    seen: list[Tensor] = []

    def remember(module: Any, inputs: tuple["Tensor", ...]) -> None:
        seen.append(inputs[0][0].mean(dim=0))

    for layer in layers:
        (layer if level == "block" else layer.mlp).register_forward_pre_hook(remember)
    with torch.inference_mode():
        for text in texts:
            model(input_ids=token_ids(tokenizer, text), use_cache=False)
    return torch.stack(seen).reshape(len(texts), len(layers), -1).transpose(0, 1)
