"""The store: all or nothing, whatever happens."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from composer.artefacts import Store, digest, write_text
from composer.errors import DiskFullError


def test_digest_does_not_depend_on_key_order() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest([1]) != digest([2])


def test_a_failed_block_leaves_nothing(store: Store) -> None:
    with pytest.raises(RuntimeError), store.new_directory("kind", "key") as directory:
        (directory / "half").write_text("written")
        raise RuntimeError
    assert list((store.root / "kind").iterdir()) == []


def test_a_finished_artefact_is_never_rewritten(store: Store) -> None:
    for text in ("first", "second"):
        with store.new_directory("kind", "key") as directory:
            (directory / "file").write_text(text)
    assert (store.path("kind", "key") / "file").read_text() == "first"


def test_a_killed_writer_leaves_nothing_that_is_seen_and_the_next_one_cleans_up(store: Store) -> None:
    code = f"""
import time
from pathlib import Path
from composer.artefacts import Store
with Store(Path({str(store.root)!r})).new_directory("kind", "key") as directory:
    (directory / "half").write_text("x")
    print("ready", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not store.path("kind", "key").exists()
    assert len(list((store.root / "kind").iterdir())) == 1
    with store.new_directory("kind", "key") as directory:
        (directory / "whole").write_text("x")
    assert [path.name for path in (store.root / "kind").iterdir()] == ["key"]


def test_text_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    write_text(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_error_and_leaves_nothing(small_disk: Path) -> None:
    store = Store(small_disk)
    with pytest.raises(DiskFullError, match="no space left"), store.new_directory("kind", "key") as directory:
        (directory / "big").write_bytes(b"x" * (2 << 20))
    assert list((small_disk / "kind").iterdir()) == []
    with pytest.raises(DiskFullError):
        write_text(small_disk / "text", "x" * (2 << 20))
    assert not (small_disk / "text").exists()
