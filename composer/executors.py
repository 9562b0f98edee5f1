"""Where heavy calls run: in this process, or fanned out over a Ray cluster.

Both run the methods of a worker, an object that is dear to make and keeps models in memory between calls; if it has a
`close`, that is called at the end. Results come back in the order of the calls, whatever ran where, so what is decided
from them does not depend on the executor.
"""

import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Literal, Protocol, TypeVar

from composer.errors import ComposerError, RecipeError, first_line

W = TypeVar("W", covariant=True)

Kind = Literal["local", "ray"]

REACH = 10.0
"""Seconds within which a cluster must answer."""
FAREWELL = 20.0
"""Seconds that workers on a cluster have to close what they hold."""


class Executor(Protocol[W]):
    """Runs methods of a worker."""

    def map(self, method: str, calls: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        """Yield what a method returns for each tuple of arguments, in their order.

        Raises:
            ComposerError: whatever a call raises.
        """
        ...

    def close(self) -> None:
        """Let workers go."""
        ...


class LocalExecutor(Generic[W]):
    """Runs everything here, one call after another."""

    def __init__(self, make: Callable[[], W]) -> None:
        """Make the worker on the first call."""
        self._make = make
        self._worker: W | None = None

    def map(self, method: str, calls: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        """See `Executor.map`."""
        if self._worker is None:
            self._worker = self._make()
        for arguments in calls:
            yield getattr(self._worker, method)(*arguments)

    def close(self) -> None:
        """Close and forget the worker."""
        worker, self._worker = self._worker, None
        _close(worker)


class _Failure:
    """An error on its way back: Ray wraps what is raised, and our errors must arrive as they are."""

    def __init__(self, error: ComposerError) -> None:
        self.error = error


class _Actor(Generic[W]):
    """A worker in a process of its own."""

    def __init__(self, make: Callable[[], W]) -> None:
        self._worker = make()

    def call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        """Call a method; return an error instead of raising it."""
        try:
            return getattr(self._worker, method)(*arguments)
        except ComposerError as error:
            return _Failure(error)

    def close(self) -> None:
        """Let the worker close what it holds."""
        _close(self._worker)


def _close(worker: Any) -> None:
    close = getattr(worker, "close", None)
    if close is not None:
        close()


class RayExecutor(Generic[W]):
    """Fans calls out over the actors of a Ray cluster.

    The cluster is the one that RAY_ADDRESS names, else one started on this machine. A worker whose process or node
    dies is started again elsewhere and repeats its call.
    """

    def __init__(self, make: Callable[[], W], workers: int | None = None) -> None:
        """Connect to the cluster.

        Args:
            make: Makes a worker; called on the node it runs on.
            workers: How many; by default one for each GPU of the cluster, else one for every two of its cores.

        Raises:
            RecipeError: if Ray is not installed or the cluster cannot be reached.
        """
        try:
            import ray
        except ImportError:
            raise RecipeError("executor 'ray' needs Ray: pip install 'model-composer[ray]'") from None
        self._ray = ray
        self._ours = not ray.is_initialized()
        if self._ours:
            address = os.environ.get("RAY_ADDRESS")
            try:
                _reach(address)
                ray.init(
                    address=address,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    include_dashboard=False,
                )
            except (OSError, ValueError, RuntimeError) as error:
                raise RecipeError(
                    f"executor 'ray': no cluster at {address or 'this machine'} ({first_line(error)}); start one "
                    "(ray start --head), or set RAY_ADDRESS to one, or to nothing for one of this machine's own"
                ) from None
        resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
        gpus, cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
        count = workers or gpus or max(1, cores // 2)
        options = {"max_restarts": -1, "max_task_retries": -1, "num_cpus": 1, "num_gpus": 1 if gpus else 0}
        self._actors: list[Any] = [ray.remote(_Actor).options(**options).remote(make) for _ in range(count)]

    def map(self, method: str, calls: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        """See `Executor.map`."""
        from ray.util import ActorPool

        pool = ActorPool(self._actors)
        for result in pool.map(lambda actor, arguments: actor.call.remote(method, arguments), list(calls)):
            if isinstance(result, _Failure):
                raise result.error
            yield result

    def close(self) -> None:
        """Stop the workers, and the cluster if it was started here."""
        # A worker that is dead or busy has no time for it; its engine ends with its process (serving/guard.py).
        farewells = [actor.close.remote() for actor in self._actors]
        self._ray.wait(farewells, num_returns=len(farewells), timeout=FAREWELL)
        for actor in self._actors:
            self._ray.kill(actor, no_restart=True)
        if self._ours:
            self._ray.shutdown()


def _reach(address: str | None) -> None:
    """Raise OSError if nobody listens at ``host:port``; Ray itself tries for ten minutes and ends the process."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=REACH).close()


def make_executor(kind: Kind, make: Callable[[], W], workers: int | None = None) -> Executor[W]:
    """Return the executor that a recipe asks for."""
    return RayExecutor(make, workers) if kind == "ray" else LocalExecutor(make)
