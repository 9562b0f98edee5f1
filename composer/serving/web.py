"""A web application on a socket of its own, in a thread of its own, and who may come in."""

import ipaddress
import resource
import socket
import threading
import time
from pathlib import Path
from typing import Any

import uvicorn

from composer.errors import ServeError
from composer.runs import runs_root
from composer.serving.door import impatient
from composer.serving.keys import KeyFile
from composer.serving.settings import ServeSection


class Web:
    """A port that is taken at once, and answered on from `start` to `stop`."""

    def __init__(self, section: ServeSection) -> None:
        """Take the port.

        Raises:
            ServeError: if it is in use or not ours to take, or API keys are missing.
        """
        self.section = section
        self.keys = _keys(section)
        self._socket = _listen(section.host, section.port)
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def loopback(self) -> bool:
        """Whether it is reached from this machine only."""
        return _is_loopback(self.section.host)

    @property
    def url(self) -> str:
        """Address that reaches it from this machine."""
        host, port = self._socket.getsockname()[:2]
        return f"http://{_reachable(host)}:{port}"

    def start(self, app: Any) -> None:
        """Answer with an application; returns when it does.

        Raises:
            ServeError: if it does not start.
        """
        _raise_file_limit()
        config = uvicorn.Config(
            app,
            http=impatient(self.section.limits.read_seconds),
            log_level="warning",
            access_log=False,
            lifespan="on",
            server_header=False,
            timeout_graceful_shutdown=max(1, round(self.section.drain_seconds)),
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise ServeError("the gateway did not start")
            time.sleep(0.02)

    def drain(self) -> None:
        """Stop taking requests, and let answers that have begun come to their end."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(timeout=self.section.drain_seconds + 15)

    def close(self) -> None:
        """Give the port back."""
        self._socket.close()


def _keys(section: ServeSection) -> KeyFile | None:
    """Return who may ask; None for everybody on this machine.

    Raises:
        ServeError: if it would listen to others and nobody has a key.
    """
    if _is_loopback(section.host) and not section.require_key:
        return None
    path = Path(section.keys) if section.keys else runs_root() / "keys.json"
    keys = KeyFile(path)
    if not keys.ring.keys:
        raise ServeError(
            f"listening on {section.host} needs an API key, and {path} holds none; make one with "
            "'model-composer keys add NAME'"
        )
    return keys


def _is_loopback(host: str) -> bool:
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
