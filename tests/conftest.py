"""Fixtures: the quickstart zoo, which is small and real, and a command line in a process of its own."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from composer.artefacts import Store
from composer.mixture import Known
from composer.zoo import Checkpoint, inspect_checkpoint

# Threads that wait for others' spin: two workers with a core each are faster than two with two each.
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if workers > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TQDM_DISABLE", "1")

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "recipes" / "quickstart"
MODELS = QUICKSTART / "models"
NOT_ASKED = Known(
    score=lambda checkpoint: pytest.fail("not asked"),
    contexts=lambda: pytest.fail("not asked"),
    losses=lambda experts: pytest.fail("not asked"),
)
"""For composites of which nothing needs to be found out."""


def children(pid: int) -> list[psutil.Process]:
    """Return all living descendants of a process."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def take_signals() -> None:
    """Give a new process the default signals: a shell starts background jobs with Ctrl-C ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def survivors(processes: list[psutil.Process], seconds: float = 20) -> list[psutil.Process]:
    """Return the processes that are still there after a while."""
    _, alive = psutil.wait_procs([one for one in processes if one.is_running()], timeout=seconds)
    return [one for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store that keeps what is slow to make for the whole session."""
    return Store(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="session")
def quick(shared_store: Store) -> dict[str, Checkpoint]:
    """All models of the quickstart zoo, by id."""
    return {path.name: inspect_checkpoint(path.name, path, shared_store) for path in sorted(MODELS.iterdir())}


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Run model-composer in a process of its own, with its runs in a temporary directory."""

    def run(*arguments: str, timeout: float = 300, **environment: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "composer.cli", *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "MODEL_COMPOSER_RUNS": str(tmp_path / "runs"), **environment},
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
        )

    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs the right to mount")
    yield disk
    for _ in range(20):
        if subprocess.run([shutil.which("umount") or "umount", str(disk)], capture_output=True).returncode == 0:
            break
        time.sleep(0.1)
