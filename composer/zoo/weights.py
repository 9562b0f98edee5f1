"""Safetensors files: headers without weights, and weights in row blocks."""

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from composer.errors import ZooError
from composer.value import Value

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


class TensorHeader(Value):
    """Where a tensor is and what it looks like."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.elements * _BYTES.get(self.dtype, 4)


def weight_files(directory: Path) -> list[Path]:
    """Return a checkpoint's safetensors files.

    Raises:
        ZooError: if there are none (pickle files do not count), or an index names a missing one.
    """
    index = directory / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise ZooError(f"{index}: not a safetensors index; copy the checkpoint again") from None
        for name in names:
            if Path(name).name != name:
                raise ZooError(f"{index}: shard '{name}' lies outside the checkpoint; refused")
            if not (directory / name).is_file():
                raise ZooError(f"{directory / name}: this shard is named by {INDEX} but missing; copy it again")
        return [directory / name for name in names]
    files = sorted(directory.glob("*.safetensors"))
    if files:
        return files
    pickles = sorted(file.name for pattern in PICKLE_PATTERNS for file in directory.glob(pattern))
    if pickles:
        raise ZooError(
            f"{directory}: only pickle weights ({pickles[0]}), which can run code when opened; "
            "convert them to safetensors on a machine you trust (load, then save_pretrained)"
        )
    raise ZooError(f"{directory}: no weights (*.safetensors) in this directory")


def read_headers(directory: Path) -> dict[str, TensorHeader]:
    """Return all tensors of a checkpoint by name, in name order, without reading any weight.

    Raises:
        ZooError: if a file is truncated or not safetensors.
    """
    headers: dict[str, TensorHeader] = {}
    for file in weight_files(directory):
        headers.update(_file_headers(file))
    if not headers:
        raise ZooError(f"{directory}: the weight files hold no tensors")
    return dict(sorted(headers.items()))


def _file_headers(file: Path) -> dict[str, TensorHeader]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ZooError(f"{file}: truncated: its header is {length} bytes long, the file only {size}; copy it again")
        try:
            entries = json.loads(stream.read(length))
            entries.pop("__metadata__", None)
            headers = {
                name: TensorHeader(file=str(file), dtype=entry["dtype"], shape=tuple(entry["shape"]))
                for name, entry in entries.items()
            }
            end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        except (ValueError, KeyError, AttributeError, TypeError, IndexError):
            raise ZooError(f"{file}: not a safetensors file; copy it again") from None
    if size != 8 + length + end:
        raise ZooError(f"{file}: truncated: {8 + length + end} bytes expected, {size} found; copy it again")
    return headers


def read_rows(headers: dict[str, TensorHeader], name: str, block_elements: int) -> Iterator["torch.Tensor"]:
    """Yield a tensor in blocks of rows, each `[rows, ...]` with about `block_elements` elements.

    A scalar comes as one block of shape `[1]`.
    """
    from safetensors import safe_open

    header = headers[name]
    with safe_open(header.file, framework="pt") as file:
        if not header.shape:
            yield file.get_tensor(name).reshape(1)
            return
        rows = header.shape[0]
        step = max(1, block_elements // max(1, header.elements // max(1, rows)))
        view = file.get_slice(name)
        for start in range(0, rows, step):
            yield view[start : start + step]
