"""Weights: tensor headers without weights, and weights a few rows at a time.

Files are read with plain reads: what is held is what was asked for, however large the model is. Only what goes over
the same weights again and again has them mapped (`MappedWeights`).
"""

import json
import mmap
import os
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

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
TORCH_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
"""What torch and configurations call the storage types of safetensors."""


class TensorHeader(Value):
    """Where a tensor is and what it looks like."""

    file: str
    dtype: str
    """As safetensors names it, e.g. "BF16"."""
    shape: tuple[int, ...]
    offset: int = 0
    """First byte of its data in the file."""

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.elements * _BYTES.get(self.dtype, 4)

    @property
    def rows(self) -> int:
        """Length of the first dimension; a scalar is one row."""
        return self.shape[0] if self.shape else 1

    @property
    def row_elements(self) -> int:
        """Elements in a row."""
        return prod(self.shape[1:])

    @property
    def torch_dtype(self) -> "torch.dtype":
        """The type as torch names it.

        Raises:
            ZooError: if torch has none for it.
        """
        import torch

        if self.dtype not in TORCH_DTYPES:
            raise ZooError(f"{self.file}: a tensor has a type nobody here can read, {self.dtype}")
        dtype: torch.dtype = getattr(torch, TORCH_DTYPES[self.dtype])
        return dtype

    @property
    def floating(self) -> bool:
        """Whether its elements are plain floating-point numbers."""
        return self.dtype in ("F64", "F32", "F16", "BF16")


class Weights(Protocol):
    """A checkpoint's tensors: what they look like, and any rows of them."""

    headers: dict[str, TensorHeader]
    """By name, in name order."""

    def read(self, name: str, start: int, stop: int) -> "torch.Tensor":
        """Return rows `start` to `stop` of a tensor, `[stop - start, ...]`, in its storage type.

        Raises:
            ZooError: if the file cannot be read or decoded, naming file and tensor.
        """
        ...


class SafetensorsWeights:
    """The weights of a Hugging Face directory, in one file or many shards."""

    def __init__(self, directory: Path) -> None:
        self.headers = read_headers(directory)

    def read(self, name: str, start: int, stop: int) -> "torch.Tensor":
        """Return rows `start` to `stop`; see `Weights.read`."""
        return read_tensor(self.headers[name], name, start, stop)


class MappedWeights(SafetensorsWeights):
    """The weights of a Hugging Face directory, mapped: for what goes over all of them again and again.

    Mapped pages are the file's own, in the page cache; nothing is copied until it is computed with.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._files: dict[str, mmap.mmap] = {}

    def flat(self, name: str) -> "torch.Tensor":
        """Return a tensor's elements in one dimension, in their storage type; not to be written to."""
        import torch

        header = self.headers[name]
        if not header.elements:
            return torch.empty(0, dtype=header.torch_dtype)
        return torch.frombuffer(
            self._file(header.file), dtype=header.torch_dtype, count=header.elements, offset=header.offset
        )

    def release(self, name: str) -> None:
        """Give a tensor's pages back to the system, which keeps them in its cache as long as there is room."""
        header = self.headers[name]
        start = -(-header.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (header.offset + header.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
        if length > 0:
            self._file(header.file).madvise(mmap.MADV_DONTNEED, start, length)

    def _file(self, path: str) -> mmap.mmap:
        if path not in self._files:
            with Path(path).open("rb") as file:
                # Private pages: torch wants to be able to write, and must not reach the file.
                self._files[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._files[path]


def read_tensor(header: TensorHeader, name: str, start: int = 0, stop: int | None = None) -> "torch.Tensor":
    """Return rows of one tensor of a safetensors file, `[stop - start, ...]`; by default all."""
    import torch

    dtype = header.torch_dtype
    rows = (header.rows if stop is None else stop) - start
    row = header.row_elements * _BYTES[header.dtype]
    buffer = torch.empty(rows * row, dtype=torch.uint8)
    descriptor = os.open(header.file, os.O_RDONLY)
    try:
        got = _read_into(descriptor, memoryview(buffer.numpy()), header.offset + start * row)  # type: ignore[arg-type]
    finally:
        os.close(descriptor)
    if got != buffer.numel():
        raise ZooError(f"{header.file}: tensor {name} ends too early; copy the checkpoint again")
    return buffer.view(dtype).reshape(rows, *header.shape[1:])


def _read_into(descriptor: int, view: memoryview, offset: int) -> int:
    """Fill `view` from a place in a file; return the bytes read, fewer if the file ends."""
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if not count:
            break
        done += count
    return done


def read_blocks(weights: Weights, name: str, elements: int) -> Iterator["torch.Tensor"]:
    """Yield a tensor in blocks of rows, each `[rows, ...]` with about `elements` elements."""
    header = weights.headers[name]
    step = max(1, elements // max(1, header.row_elements))
    for start in range(0, header.rows, step):
        yield weights.read(name, start, min(start + step, header.rows))


def weight_files(directory: Path) -> list[Path]:
    """Return a checkpoint's safetensors files.

    Raises:
        ZooError: if there are none (pickle files do not count), or an index names a missing one.
    """
    index = directory / INDEX
    if index.is_file():
        names = index_shards(index)
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


def index_shards(index: Path) -> list[str]:
    """Return the names of the shards that an index lists.

    Raises:
        ZooError: if it is no safetensors index.
    """
    return sorted(set(_index(index).values()))


def _index(index: Path) -> dict[str, str]:
    try:
        names = json.loads(index.read_text())["weight_map"]
        return {str(key): str(value) for key, value in names.items()}
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ZooError(f"{index}: not a safetensors index; copy the checkpoint again") from None


def read_headers(directory: Path) -> dict[str, TensorHeader]:
    """Return all tensors of a checkpoint by name, in name order, without reading any weight.

    Raises:
        ZooError: if a file is truncated or not safetensors, or index and shards disagree.
    """
    headers: dict[str, TensorHeader] = {}
    for file in weight_files(directory):
        for name, header in file_headers(file).items():
            if name in headers:
                raise ZooError(f"{file}: tensor {name} is also in {Path(headers[name].file).name}; copy it again")
            headers[name] = header
    if not headers:
        raise ZooError(f"{directory}: the weight files hold no tensors")
    index = directory / INDEX
    if index.is_file():
        for name, shard in _index(index).items():
            if name not in headers or Path(headers[name].file).name != shard:
                raise ZooError(
                    f"{directory / shard}: tensor {name} is not in it, though {INDEX} says so; copy it again"
                )
    return dict(sorted(headers.items()))


def file_headers(file: Path) -> dict[str, TensorHeader]:
    """Return the tensors of one safetensors file.

    Raises:
        ZooError: if it is truncated or of another format.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ZooError(f"{file}: truncated: its header is {length} bytes long, the file only {size}; copy it again")
        try:
            entries = json.loads(stream.read(length))
            entries.pop("__metadata__", None)
            headers = {
                name: TensorHeader(
                    file=str(file),
                    dtype=entry["dtype"],
                    shape=tuple(entry["shape"]),
                    offset=8 + length + entry["data_offsets"][0],
                )
                for name, entry in entries.items()
            }
            end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
            sizes = {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in entries.items()}
        except (ValueError, KeyError, AttributeError, TypeError, IndexError):
            raise ZooError(f"{file}: not a safetensors file; copy it again") from None
    if size != 8 + length + end:
        raise ZooError(f"{file}: truncated: {8 + length + end} bytes expected, {size} found; copy it again")
    for name, header in headers.items():
        if header.dtype in _BYTES and sizes[name] != header.nbytes:
            raise ZooError(
                f"{file}: tensor {name} has {sizes[name]} bytes where its shape {list(header.shape)} takes "
                f"{header.nbytes}; copy it again"
            )
    return headers
