"""Content-addressed storage: what is derived once is never derived again, and never half-seen.

The key of an artefact is the hash of everything that determines it. Content is written to a temporary
sibling, flushed, and renamed into place, so a finished artefact is complete and a killed writer leaves nothing
under the final name.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from composer.errors import disk_errors


def digest(value: Any) -> str:
    """Return the sha256 of a JSON-serialisable value, as 64 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_text(path: Path, text: str) -> Path:
    """Replace the contents of `path` with `text`, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(path)
    try:
        with disk_errors(path):
            with temporary.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


class Store:
    """A directory of artefacts, laid out as ``<root>/<kind>/<key>``."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, kind: str, key: str) -> Path:
        """Return where the artefact of this kind and key lives, whether or not it exists."""
        return self.root / kind / key

    @contextmanager
    def new_directory(self, kind: str, key: str) -> Iterator[Path]:
        """Yield an empty directory that becomes the artefact if, and only if, the block succeeds.

        An artefact that already exists is left as it is; the new directory is then discarded.

        Raises:
            DiskFullError: if the disk fills up in the block.
        """
        final = self.path(kind, key)
        final.parent.mkdir(parents=True, exist_ok=True)
        self._remove_abandoned(final)
        temporary = _sibling(final)
        try:
            with disk_errors(final):
                temporary.mkdir()
                yield temporary
                _flush(temporary)
                try:
                    temporary.rename(final)
                except OSError:
                    if not final.exists():  # made by another process meanwhile is as good
                        raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _remove_abandoned(self, final: Path) -> None:
        """Delete what a killed process left behind for the same key."""
        for leftover in final.parent.glob(f".{final.name}.*.partial"):
            owner = int(leftover.name.split(".")[-3])
            if not psutil.pid_exists(owner):
                shutil.rmtree(leftover, ignore_errors=True)


def _sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.partial")


def _flush(directory: Path) -> None:
    for file in sorted(directory.rglob("*")):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
