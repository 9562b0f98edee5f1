"""Writing a checkpoint as an ordinary Hugging Face directory, a block of weights at a time."""

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

from composer.zoo.weights import INDEX, TensorHeader

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 5 * 10**9
"""Largest weight file, unless a single tensor is larger."""


WAITING = 8
"""Blocks that may wait to be written."""
SYNC_BYTES = 1 << 26
"""After so many bytes the disk is told to begin, so that not all is left to the end."""


class WeightsWriter:
    """Writes tensors to safetensors files as they come; holds nothing but a few blocks.

    Tensors must come in the order of their headers, and each from its first element to its last. Writing and hashing
    are done by a thread of their own while the next blocks are computed.

    What is not `lasting` is neither hashed nor brought to the disk.

    Attributes:
        hashes: sha256 of each file by name, once all is written; empty strings for what is not lasting.
    """

    def __init__(
        self, directory: Path, headers: dict[str, TensorHeader], shard_bytes: int = SHARD_BYTES, *, lasting: bool = True
    ) -> None:
        self._directory, self._headers, self._lasting = directory, headers, lasting
        self._shards = _shards(headers, shard_bytes)
        self._names = iter(headers)
        self._name: str | None = None
        self._missing = 0
        """Elements of the tensor at hand that have not come yet."""
        self._number = 0
        self._file: _HashedFile | None = None
        self._thread = ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()
        self.hashes: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def write(self, name: str, block: "torch.Tensor") -> None:
        """Write the next elements of a tensor, in the type its header says."""
        import torch

        if not self._missing:
            self._next(name)
        if name != self._name or block.numel() > self._missing or block.dtype != self._headers[name].torch_dtype:
            raise ValueError(f"a block of {name} where {self._missing} elements of {self._name} were due")
        self._missing -= block.numel()
        data = memoryview(block.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        self._waiting.append(self._thread.submit(cast("_HashedFile", self._file).write, data))
        if len(self._waiting) > WAITING:
            self._waiting.popleft().result()

    def _next(self, name: str) -> None:
        self._name = next(self._names, None)
        if self._name is None:
            raise ValueError(f"a block of {name}, which has been written")
        self._missing = self._headers[self._name].elements
        if self._file is None or self._name == self._shards[self._number][0]:
            self._open(self._shards[self._number])

    def _open(self, names: list[str]) -> None:
        self._close()
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        place = 0
        for name in names:
            header = self._headers[name]
            end = place + header.nbytes
            entries[name] = {"dtype": header.dtype, "shape": list(header.shape), "data_offsets": [place, end]}
            place = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = _HashedFile(self._directory / self._file_name(self._number), lasting=self._lasting)
        self._file.write(memoryview(len(text).to_bytes(8, "little") + text))
        self._number = min(self._number + 1, len(self._shards) - 1)

    def _file_name(self, number: int) -> str:
        count = len(self._shards)
        return "model.safetensors" if count == 1 else f"model-{number + 1:05}-of-{count:05}.safetensors"

    def _close(self) -> None:
        while self._waiting:
            self._waiting.popleft().result()
        if self._file is not None:
            self.hashes[self._file.path.name] = self._file.close()
            self._file = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._thread.shutdown(cancel_futures=True)
            if self._file is not None:
                self._file.close()
            return
        self._close()
        self._thread.shutdown()
        left = self._name if self._missing else next(self._names, None)
        if left is not None:
            raise ValueError(f"tensor {left} was not written whole")
        if len(self._shards) > 1:
            names = {name: self._file_name(number) for number, shard in enumerate(self._shards) for name in shard}
            total = sum(header.nbytes for header in self._headers.values())
            content = {"metadata": {"total_size": total}, "weight_map": names}
            (self._directory / INDEX).write_text(json.dumps(content, indent=2))


class _HashedFile:
    """A file that is hashed as it is written, if it is to last."""

    def __init__(self, path: Path, *, lasting: bool) -> None:
        self.path = path
        self._file = path.open("wb", buffering=0)
        self._hash = hashlib.sha256() if lasting else None
        self._unsynced = 0

    def write(self, data: memoryview) -> None:
        if self._hash is not None:
            self._hash.update(data)
        done = 0
        while done < len(data):
            done += self._file.write(data[done:]) or 0
        self._unsynced += len(data)
        if self._hash is not None and self._unsynced >= SYNC_BYTES:
            os.fdatasync(self._file.fileno())
            self._unsynced = 0

    def close(self) -> str:
        """Close the file and return its sha256, or nothing if it is not to last."""
        self._file.close()
        return self._hash.hexdigest() if self._hash is not None else ""


def _shards(headers: dict[str, TensorHeader], limit: int) -> list[list[str]]:
    """Split tensors into runs of at most `limit` bytes, each of at least one tensor."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, header in headers.items():
        if shards[-1] and size + header.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += header.nbytes
    return shards


def write_description(home: Path, directory: Path, changes: dict[str, Any]) -> None:
    """Write a model's configuration with some changes, and what belongs to it besides weights and tokenizer.

    Args:
        home: The directory that has them.
        directory: Where they are written.
        changes: Keys of config.json.
    """
    config = json.loads((home / "config.json").read_text())
    if "dtype" in changes:
        config.pop("torch_dtype", None)
    (directory / "config.json").write_text(json.dumps({**config, **changes}, indent=2) + "\n")
    copy_files([home / "generation_config.json", *home.glob("LICEN[CS]E*"), *home.glob("*.py")], directory)


def copy_files(files: Iterable[Path], directory: Path) -> None:
    """Copy those of some files that exist."""
    for file in files:
        if file.is_file():
            shutil.copyfile(file, directory / file.name)
