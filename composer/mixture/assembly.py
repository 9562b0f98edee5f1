"""Assembling a checkpoint from tensors of others, a block of rows at a time."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer.errors import ZooError
from composer.zoo import TOKENIZER_FILES, Checkpoint, TensorHeader, Weights, open_weights, read_blocks
from composer.zoo.weights import TORCH_DTYPES
from composer.zoo.writing import WeightsWriter, copy_files

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1 << 24
"""Elements read and written at a time."""


@dataclass(frozen=True)
class Part:
    """A tensor of the result, before it has the result's type."""

    shape: tuple[int, ...]
    blocks: Callable[[], Iterator["Tensor"]]
    """Reads or makes it, from its first row to its last."""
    dtype: str | None = None
    """Its type as safetensors names it, where it is not the result's."""


class Donor:
    """A checkpoint whose tensors are taken."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.id = checkpoint.id
        self.weights: Weights = open_weights(checkpoint.source, Path(checkpoint.home))

    def __contains__(self, name: str) -> bool:
        return name in self.weights.headers

    def part(self, name: str, *, keep: bool = False) -> Part:
        """Return one of its tensors as a part.

        Args:
            name: The tensor's.
            keep: Whether it keeps its type, whatever the result's is.

        Raises:
            ZooError: if it has no such tensor.
        """
        if name not in self:
            raise ZooError(f"model '{self.id}': tensor {name} is not in it; copy the checkpoint again")
        header = self.weights.headers[name]
        return Part(header.shape, lambda: read_blocks(self.weights, name, BLOCK), header.dtype if keep else None)


def made(tensor: "Tensor", dtype: str | None = None) -> Part:
    """Return a tensor at hand as a part."""
    return Part(tuple(tensor.shape), lambda: iter((tensor,)), dtype)


def assemble(parts: Mapping[str, Part], dense: Checkpoint, config: Any, directory: Path) -> dict[str, str]:
    """Write a checkpoint.

    Args:
        parts: Its tensors by name, in the order they are written in.
        dense: Gives storage type, tokenizer, generation settings and licence.
        config: Its configuration, one of transformers'.
        directory: Where it is written; exists and is empty.

    Returns:
        sha256 of each weight file.

    Raises:
        ZooError: if a tensor cannot be read.
    """
    headers = {
        name: TensorHeader(file="", dtype=part.dtype or dense.dtype, shape=part.shape) for name, part in parts.items()
    }
    with WeightsWriter(directory, headers) as writer:
        for name, part in parts.items():
            for block in part.blocks():
                writer.write(name, block.to(headers[name].torch_dtype))
    config.dtype = TORCH_DTYPES[dense.dtype]
    config.save_pretrained(directory)
    home = Path(dense.home)
    copy_files([home / "generation_config.json", *home.glob("LICEN[CS]E*")], directory)
    copy_files((Path(dense.tokenizer_home) / name for name in TOKENIZER_FILES), directory)
    return writer.hashes
