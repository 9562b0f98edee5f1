"""LoRA adapters, folded into their base a few rows at a time.

A folded weight is W + s·B·A with s = alpha / r, or alpha / sqrt(r) where the adapter says so (rsLoRA, arXiv
2312.03732); with DoRA (arXiv 2402.09353) each of its rows is then scaled to the learned magnitude. Computed in
float32 and rounded to the base's storage type, so that rows read lazily and a checkpoint written whole are the same.
"""

import json
import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer.errors import ZooError
from composer.zoo.weights import TensorHeader, Weights, file_headers, read_tensor

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = re.compile(r"^(base_model\.model\.|base_model\.)")
_FACTORS = re.compile(
    r"^(?P<module>.+)\.(?P<factor>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(\.default)?(\.weight)?$"
)


def adapter_config(directory: Path) -> dict[str, Any]:
    """Return the settings of a PEFT adapter.

    Raises:
        ZooError: if the directory holds no LoRA adapter in safetensors.
    """
    file = directory / CONFIG
    if not file.is_file():
        raise ZooError(f"{directory}: no {CONFIG}; is it a PEFT adapter?")
    try:
        config = json.loads(file.read_text())
        kind = config.get("peft_type")
    except (ValueError, AttributeError):
        raise ZooError(f"{file}: not a JSON object; copy it again") from None
    if kind != "LORA":
        raise ZooError(f"{file}: peft_type {kind} cannot be folded into a model; only LORA can")
    if not (directory / WEIGHTS).is_file():
        raise ZooError(f"{directory}: no {WEIGHTS}; convert the adapter to safetensors (load, then save_pretrained)")
    return dict(config)


class FoldedWeights:
    """The weights of a base with a LoRA adapter folded in."""

    def __init__(self, base: Weights, directory: Path) -> None:
        """Match the adapter's factors with the base's tensors.

        Raises:
            ZooError: if the adapter is for another base, naming the first tensor that does not fit.
        """
        self.headers = base.headers
        self._base = base
        self._file = directory / WEIGHTS
        self._config = adapter_config(directory)
        self._adapter_headers = file_headers(self._file)
        self._deltas: dict[str, _Delta] = {}
        self._replaced: dict[str, str] = {}
        factors: dict[str, dict[str, str]] = {}
        for name in self._adapter_headers:
            match = _FACTORS.match(name)
            if match:
                factors.setdefault(match["module"], {})[match["factor"]] = name
            else:
                self._replaced[self._target(name, name)] = name
        for module, names in factors.items():
            target = self._target(module + ".weight", next(iter(names.values())))
            self._deltas[target] = self._delta(module, target, names)
        for target, name in self._replaced.items():
            self._fits(name, self._adapter_headers[name].shape, target)
        changed = self._deltas.keys() | self._replaced.keys()
        # Errors in a changed tensor point at the adapter; errors of the base alone show where the base is read.
        self.headers = {
            name: header.model_copy(update={"file": str(self._file)}) if name in changed else header
            for name, header in base.headers.items()
        }

    def read(self, name: str, start: int, stop: int) -> "torch.Tensor":
        """Return rows `start` to `stop` with the adapter folded in; see `Weights.read`."""
        if name in self._replaced:  # a whole tensor of the adapter; it may have factors besides
            stored = read_tensor(self._adapter_headers[self._replaced[name]], self._replaced[name], start, stop)
            rows = stored.to(self.headers[name].torch_dtype)
        else:
            rows = self._base.read(name, start, stop)
        return self._deltas[name].fold(rows, start, stop).to(rows.dtype) if name in self._deltas else rows

    def _target(self, key: str, name: str) -> str:
        """Return the base's name of what an adapter's tensor changes."""
        plain = _PREFIX.sub("", key).replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
        plain = plain.replace(".base_layer.", ".")
        if plain in self.headers:
            return plain
        raise ZooError(
            f"{self._file}: tensor {name} changes {plain}, which the base does not have"
            f"{' of its own (its head is tied)' if plain == 'lm_head.weight' else ''}; "
            "the adapter is for another base"
        )

    def _delta(self, module: str, target: str, names: dict[str, str]) -> "_Delta":
        first, second = (
            ("lora_embedding_A", "lora_embedding_B") if "lora_embedding_A" in names else ("lora_A", "lora_B")
        )
        if first not in names or second not in names:
            raise ZooError(f"{self._file}: {module} has only one of its two factors; copy the adapter again")
        a, b = (self._adapter_headers[names[factor]] for factor in (first, second))
        rank = a.shape[0]
        transposed = bool(self._config.get("fan_in_fan_out")) or first == "lora_embedding_A"
        shape = (a.shape[1], b.shape[0]) if transposed else (b.shape[0], a.shape[1])
        self._fits(names[first], shape, target)
        if transposed and "lora_magnitude_vector" in names:
            raise ZooError(
                f"{self._file}: DoRA on {target}, which is stored transposed, cannot be folded row by row; "
                "fold it with PEFT (merge_and_unload, save_pretrained) and give the result"
            )
        plain = _PREFIX.sub("", module)
        alpha = _by_pattern(self._config.get("alpha_pattern"), plain, self._config.get("lora_alpha", rank))
        return _Delta(
            a=(a, names[first]),
            b=(b, names[second]),
            magnitude=(
                (self._adapter_headers[names["lora_magnitude_vector"]], names["lora_magnitude_vector"])
                if "lora_magnitude_vector" in names
                else None
            ),
            scale=float(alpha) / (rank**0.5 if self._config.get("use_rslora") else rank),
            transposed=transposed,
        )

    def _fits(self, name: str, shape: tuple[int, ...], target: str) -> None:
        if tuple(shape) != self.headers[target].shape:
            raise ZooError(
                f"{self._file}: tensor {name} is for a matrix of shape {list(shape)}, but {target} of the base has "
                f"{list(self.headers[target].shape)}; the adapter is for another base"
            )


class _Delta:
    """What an adapter adds to one matrix."""

    def __init__(
        self,
        a: tuple[TensorHeader, str],
        b: tuple[TensorHeader, str],
        magnitude: tuple[TensorHeader, str] | None,
        scale: float,
        transposed: bool,
    ) -> None:
        self._a, self._b, self._magnitude = a, b, magnitude
        self._scale, self._transposed = scale, transposed

    @cached_property
    def _factors(self) -> "tuple[torch.Tensor, torch.Tensor]":
        """Left and right factors, `[rows, r]` and `[r, columns]`, in float32."""
        a, b = (read_tensor(*one).float() for one in (self._a, self._b))
        return (a.T, b.T) if self._transposed else (b, a)

    def fold(self, rows: "torch.Tensor", start: int, stop: int) -> "torch.Tensor":
        left, right = self._factors
        folded = rows.float() + self._scale * (left[start:stop] @ right)
        if self._magnitude is not None:
            magnitude = read_tensor(*self._magnitude).float().reshape(-1)[start:stop]
            folded *= (magnitude / folded.norm(dim=1)).unsqueeze(1)
        return folded


def _by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """Return the value of the first pattern that ends a module's name, as PEFT matches them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
