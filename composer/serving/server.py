"""A composite behind its endpoint: engines, router and gateway, up or down together."""

import ipaddress
import resource
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import uvicorn
from pydantic import Field

from composer.artefacts import Store
from composer.errors import ServeError
from composer.mixture import Composite, load_router
from composer.progress import Progress, Step, silent
from composer.runs import runs_root
from composer.serving.door import impatient
from composer.serving.gateway import create_app
from composer.serving.keys import KeyFile
from composer.serving.settings import ServeSection
from composer.serving.supervisor import Supervisor
from composer.value import Value


class Endpoint(Value):
    """Where a served composite answers, and how."""

    url: str
    """Base address, without "/v1"."""
    model: str
    """The composite's name."""
    engines: dict[str, str]
    """Kind of engine by expert."""
    max_model_len: dict[str, int]
    """Longest sequence by expert, in tokens."""
    notes: tuple[str, ...] = ()
    """Why an engine is not the usual one."""
    scores_prompts: bool
    """Whether every engine gives log-probabilities of prompts."""
    key: str = Field(default="", exclude=True, repr=False)
    """What opens it to its own process, where it asks for keys; never written down."""


class Server:
    """Serves a composite while the context is open.

    The port is taken first, so that one in use is found before any engine starts; nothing is left running when
    the context closes, by whatever way.
    """

    def __init__(
        self,
        directory: Path,
        section: ServeSection,
        logs: Path,
        progress: Progress = silent,
        store: Store | None = None,
    ) -> None:
        """Prepare to serve a composite.

        Args:
            directory: Where it is.
            section: The recipe's serve settings.
            logs: Takes the engines' output.
            progress: Told of each engine.
            store: Remembers hashes; where it is given, experts that have changed since they were built are refused.

        Raises:
            ServeError: if there is no composite.
        """
        self.store = store
        self.directory = directory
        self.section = section
        self.progress = progress
        self.composite = Composite.open(directory)
        self.supervisor = Supervisor(self.composite, section, logs, progress)
        self.endpoint: Endpoint
        self._gateway: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._socket: socket.socket | None = None

    def __enter__(self) -> Self:
        """Start everything and wait until it answers.

        Raises:
            ServeError: if the port is taken, API keys are missing, an expert has changed, or an engine cannot start.
        """
        try:
            keys = self._keys()
            self._socket = _listen(self.section.host, self.section.port)
            if self.store is not None:
                self.composite.verify(self.store)
            self.supervisor.start()
            self.progress(Step(stage="serve", message="loading the router"))
            self._start_gateway(self._socket, keys)
        except BaseException:
            self.stop()
            raise
        host, port = self._socket.getsockname()[:2]
        supervisor, names = self.supervisor, [expert.id for expert in self.composite.experts]
        places = [engine.place for engine in supervisor.engines]
        self.endpoint = Endpoint(
            url=f"http://{_reachable(host)}:{port}",
            model=self.composite.name,
            engines={name: supervisor.kind(name) for name in names},
            max_model_len={name: supervisor.max_model_len(name) for name in names},
            notes=tuple(f"{place.name}: {place.note}" for place in places if place.note),
            scores_prompts=all(supervisor.scores_prompts(name) for name in names),
            key=keys.own if keys else "",
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop taking requests, let answers that have begun come to their end, then stop the engines."""
        if self._gateway is not None and self._thread is not None:
            self._gateway.should_exit = True
            self._thread.join(timeout=self.section.drain_seconds + 15)
        self.supervisor.stop()
        if self._socket is not None:
            self._socket.close()

    def _keys(self) -> KeyFile | None:
        """Return who may ask; None for everybody on this machine.

        Raises:
            ServeError: if it would listen to others and nobody has a key.
        """
        if is_loopback(self.section.host) and not self.section.require_key:
            return None
        path = keys_file(self.section)
        keys = KeyFile(path)
        if not keys.ring.keys:
            raise ServeError(
                f"listening on {self.section.host} needs an API key, and {path} holds none; make one with "
                "'model-composer keys add NAME'"
            )
        return keys

    def _start_gateway(self, listener: socket.socket, keys: KeyFile | None) -> None:
        _raise_file_limit()
        router = load_router(self.directory)
        loopback = is_loopback(self.section.host)
        door, gateway = create_app(self.composite, router, self.supervisor, self.section, keys=keys, loopback=loopback)
        self.supervisor.room = gateway.room
        app: Any = door
        config = uvicorn.Config(
            app,
            http=impatient(self.section.limits.read_seconds),
            log_level="warning",
            access_log=False,
            lifespan="on",
            server_header=False,
            timeout_graceful_shutdown=max(1, round(self.section.drain_seconds)),
        )
        self._gateway = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._gateway.run, args=([listener],), daemon=True)
        self._thread.start()
        while not self._gateway.started:
            if not self._thread.is_alive():
                raise ServeError("the gateway did not start")
            time.sleep(0.02)


def keys_file(section: ServeSection) -> Path:
    """Return the file of API keys."""
    return Path(section.keys) if section.keys else runs_root() / "keys.json"


def is_loopback(host: str) -> bool:
    """Return whether an address to listen on is reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _raise_file_limit() -> None:
    """Allow as many open files as the system does: each request takes two, and the usual limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _listen(host: str, port: int) -> socket.socket:
    """Take the port now.

    Raises:
        ServeError: if it is in use or not ours to take.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise ServeError(
            f"cannot listen on {host}:{port}: {reason}; choose another with serve.port=N (0 takes any free one)"
        ) from None
    return listener


def _reachable(host: str) -> str:
    """Return an address that reaches a socket bound to `host` from this machine."""
    if host in ("0.0.0.0", "::"):  # noqa: S104 - only asked for, never chosen
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
