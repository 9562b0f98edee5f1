"""A living vLLM engine, into which the weights of one candidate after another are swapped.

Door: `LivingEngine`, a context manager. Starting an engine takes many seconds, swapping weights a fraction of one.
"""

import fcntl
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Client, Connection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from composer.errors import ServeError, ZooError
from composer.zoo.checkpoint import Checkpoint
from composer.zoo.weights import read_headers

if TYPE_CHECKING:
    from torch import Tensor

    from composer.evaluation.lm import Answer, Pair, Tokens

MEMORY = Path("/dev/shm")  # noqa: S108 - directories in it are made by tempfile
"""A file system in memory, where there is one."""
SHARE = 0.7
"""The part of a GPU's memory that an engine takes; the rest is for what its caller computes meanwhile."""
_PREFIX = "composer-berth-"
_YOUNG = 60.0
"""Seconds in which a new berth may have no holder yet."""

_GUARD = Path(__file__).with_name("guard.py")


class LivingEngine:
    """One vLLM engine in a process of its own, for models of one shape.

    It answers one call at a time, and is to be used by one thread. It does not outlive this process.

    Attributes:
        max_model_len: The longest sequence it takes, in tokens.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        log: Path,
        *,
        dtype: str = "auto",
        max_model_len: int | None = None,
        kv_cache_mb: int = 256,
        start_timeout: float = 600,
    ) -> None:
        """Prepare to start the engine.

        Args:
            checkpoint: The first weights, and the shape of all that follow.
            log: Takes the engine's output.
            dtype: What it computes in; `auto` is float32 on a CPU, the checkpoint's own on a GPU.
            max_model_len: The longest sequence, in tokens; by default what the checkpoint takes.
            kv_cache_mb: Memory for the key-value cache on a CPU, in MB.
            start_timeout: How long it may take to start, in seconds.
        """
        self.checkpoint = checkpoint
        self.log = log
        self.start_timeout = start_timeout
        self.max_model_len: int
        self._settings = {"dtype": dtype, "max_model_len": max_model_len, "kv_cache_mb": kv_cache_mb, "share": SHARE}
        self._shape = _shape(Path(checkpoint.path))
        self._child: _Child | None = None

    def __enter__(self) -> Self:
        """Start it and wait until it answers.

        Raises:
            ServeError: if it dies or is not ready in time.
        """
        self._child = _Child(self.checkpoint.id, self.log, {**self._settings, "model": self.checkpoint.path})
        try:
            self.max_model_len = int(self._child.connect(time.monotonic() + self.start_timeout))
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop the engine and wait until it is gone."""
        if self._child is not None:
            self._child.stop()
            self._child = None

    def swap(self, directory: Path) -> None:
        """Put the weights of a checkpoint in the place of those that are there.

        Configuration and tokenizer stay the first checkpoint's. The files are not needed afterwards. After an error in
        the engine itself, it is stopped: what weights it has then, nobody knows.

        Args:
            directory: Holds safetensors files with tensors of the same names and shapes as the first checkpoint's.

        Raises:
            ServeError: if they are of another shape, or cannot be swapped in.
        """
        self._check(_shape(directory), str(directory))
        try:
            self._call("swap", str(directory.resolve()))
        except ServeError:
            self.stop()
            raise

    def load(self, tensors: Mapping[str, "Tensor"]) -> None:
        """Put weights in the place of those that are there.

        Args:
            tensors: By name, of the same names and shapes as the first checkpoint's.

        Raises:
            ServeError: as `swap`.
        """
        from safetensors.torch import save_file

        self._check({name: tuple(tensor.shape) for name, tensor in tensors.items()}, "what was given")
        with berth(sum(tensor.nbytes for tensor in tensors.values())) as directory:
            save_file(dict(tensors), directory / "model.safetensors", metadata={"format": "pt"})
            self.swap(directory)

    def score(self, pairs: Sequence["Pair"]) -> list["Answer"]:
        """Return for each pair the log-likelihood (nats) of what follows, and whether greedy decoding writes it.

        What is longer than `max_model_len` - 1 tokens loses its left end.

        Args:
            pairs: Tokens of a context, at least one, and of what follows it.

        Raises:
            ServeError: if the engine fails.
        """
        return [(float(value), bool(greedy)) for value, greedy in self._call("score", list(pairs))]

    def complete(self, prompts: Sequence["Tokens"], max_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        """Return what greedy decoding writes after each prompt, without the stop sequence it ends with.

        Args:
            prompts: Tokens of each.
            max_tokens: Most tokens of an answer; a prompt that leaves no room for them loses its left end.
            stop: Texts that end an answer.

        Raises:
            ServeError: if the engine fails.
        """
        return [str(text) for text, _ in self._call("complete", list(prompts), max_tokens, list(stop))]

    def write(self, prompts: Sequence["Tokens"], max_tokens: int, stop: Sequence[str] = ()) -> list["Tokens"]:
        """Return the tokens that greedy decoding writes after each prompt, up to those that end it.

        Arguments and errors as of `complete`.
        """
        return [tuple(tokens) for _, tokens in self._call("complete", list(prompts), max_tokens, list(stop))]

    def _check(self, shape: dict[str, tuple[int, ...]], what: str) -> None:
        for name in sorted(shape.keys() | self._shape.keys()):
            given, wanted = (one.get(name) for one in (shape, self._shape))
            if given != wanted:
                raise ServeError(
                    f"{what}: tensor {name} is {_words(given)}, in '{self.checkpoint.id}' it is {_words(wanted)}; "
                    "only models of one shape can be swapped"
                )

    def _call(self, method: str, *arguments: Any) -> Any:
        if self._child is None:
            raise ServeError(f"the engine of '{self.checkpoint.id}' is not running (log: {self.log})")
        return self._child.call(method, *arguments)


class _Child:
    """The engine's process behind its guard, and the socket that leads to it."""

    def __init__(self, name: str, log: Path, settings: dict[str, Any]) -> None:
        self.name = f"the engine of '{name}'"
        self.log = log
        self.room = tempfile.TemporaryDirectory(prefix="composer-")
        self.address = str(Path(self.room.name) / "engine")
        self.key = secrets.token_hex()
        self.connection: Connection | None = None
        main = [sys.executable, "-m", "composer.serving.swap_main", json.dumps({**settings, "address": self.address})]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-S", str(_GUARD), *main],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "COMPOSER_ENGINE_KEY": self.key},
                start_new_session=True,  # Ctrl-C reaches us first; we close the pipe in good order
            )

    def connect(self, end: float) -> Any:
        """Wait until it listens and then for its first words, no longer than until `end`."""
        while not Path(self.address).exists():
            self.watch(end)
            time.sleep(0.02)
        self.connection = Client(self.address, "AF_UNIX", authkey=self.key.encode())
        return self.answer(self.connection, end)

    def call(self, method: str, *arguments: Any) -> Any:
        """Ask, and wait for the answer as long as the process lives."""
        if self.connection is None:
            raise ServeError(f"{self.name} has not been reached (log: {self.log})")
        try:
            self.connection.send((method, arguments))
        except ConnectionError:
            raise ServeError(f"{self.name} died; the log says why: {self.log}") from None
        return self.answer(self.connection)

    def answer(self, connection: Connection, end: float | None = None) -> Any:
        """Return the next answer.

        Raises:
            ServeError: if it is an error, or there will be none.
        """
        try:
            while not connection.poll(0.5):
                self.watch(end)
            done, answer = connection.recv()
        except (EOFError, ConnectionError):
            raise ServeError(f"{self.name} died; the log says why: {self.log}") from None
        if not done:
            raise ServeError(f"{self.name} failed: {answer} (log: {self.log})")
        return answer

    def watch(self, end: float | None) -> None:
        """Look whether the process lives.

        Raises:
            ServeError: if it does not, or if `end` has passed.
        """
        if self.process.poll() is not None:
            raise ServeError(f"{self.name} died; the log says why: {self.log}")
        if end is not None and time.monotonic() > end:
            raise ServeError(f"{self.name} was not ready in time; raise start_timeout (log: {self.log})")

    def stop(self) -> None:
        """Stop the process, wait until it is gone, and tidy up."""
        if self.connection is not None:
            self.connection.close()
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()
        self.room.cleanup()


@contextmanager
def berth(size: int) -> Iterator[Path]:
    """Give an empty directory for weights, in memory where there is room for them; it is gone afterwards.

    Args:
        size: Bytes that will be written.
    """
    parent = None
    if os.access(MEMORY, os.W_OK):
        _clear(MEMORY)
        parent = MEMORY if shutil.disk_usage(MEMORY).free > 1.1 * size else None
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=parent) as directory, _held(Path(directory)):
        yield Path(directory)


def _clear(parent: Path) -> None:
    """Remove berths whose holder was killed: memory has no one else who would ever tidy it up."""
    for left in parent.glob(_PREFIX + "*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _YOUNG:
                with _held(left):
                    shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    """Hold a directory as long as this process lives at most; OSError if somebody else holds it."""
    place = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(place)


def _shape(directory: Path) -> dict[str, tuple[int, ...]]:
    try:
        return {name: header.shape for name, header in read_headers(directory).items()}
    except ZooError as error:
        raise ServeError(str(error)) from None


def _words(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape))
