"""The endpoint's door: who may come in, how many at once, and what is counted of each."""

import asyncio
import contextlib
import ipaddress
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from composer.serving.keys import KeyFile
from composer.serving.metrics import Metrics
from composer.serving.settings import Limits

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

OPEN = ("/health",)
"""Paths that need no key and are never turned away: whoever balances load has to see them."""
DRAIN_BYTES, DRAIN_SECONDS = 1 << 20, 1.0
"""How much of a request that is refused is still read."""
EXPERT = b"x-composer-expert"


class RequestError(Exception):
    """A request that cannot be answered; becomes an error in OpenAI's shape."""

    def __init__(
        self, status: int, message: str, parameter: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.parameter, self.headers = status, message, parameter, headers or {}

    @property
    def body(self) -> bytes:
        """The error in OpenAI's shape."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        kind = "server_error" if self.status >= 500 else kind
        error = {"message": self.message, "type": kind, "param": self.parameter, "code": self.status}
        return orjson.dumps({"error": error})


@dataclass
class Door:
    """Asks for a key, turns away what is too much, and counts what is answered."""

    app: App
    limits: Limits
    metrics: Metrics
    paths: frozenset[str]
    """Paths that are counted under their own name."""
    keys: KeyFile | None = None
    """Who may come in; None lets everybody in."""
    loopback: bool = True
    """Whether only names of this machine are answered to: a web page elsewhere can give its own name this address."""
    open: int = field(default=0, init=False)
    """Requests being answered."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        began = time.perf_counter()
        seen = {"status": 500, "first": 0.0, "expert": ""}

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen["status"] = message["status"]
                seen["expert"] = next((v.decode() for k, v in message["headers"] if k == EXPERT), "")
            elif not seen["first"]:
                seen["first"] = time.perf_counter() - began
            await send(message)

        self.open += 1
        self.metrics.open.set(self.open)
        try:
            self._check(scope, path)
            await self.app(scope, receive, counted)
        except RequestError as error:
            await _drain(receive)
            await refuse(error, counted)
        finally:
            self.open -= 1
            self.metrics.open.set(self.open)
            known = path if path in self.paths else "other"
            seconds = time.perf_counter() - began
            self.metrics.answered(known, seen["expert"], seen["status"], seen["first"] or seconds, seconds)  # type: ignore[arg-type]

    def _check(self, scope: Message, path: str) -> None:
        headers = dict(scope["headers"])
        if self.loopback and not is_loopback(headers.get(b"host", b"").decode("latin-1")):
            raise RequestError(403, "this endpoint answers to names of its own machine only (serve.host)")
        if path in OPEN:
            return
        if self.keys is not None:
            given = headers.get(b"authorization", b"").decode("latin-1")
            scheme, _, key = given.partition(" ")
            if scheme.lower() != "bearer" or self.keys.opens(key.strip()) is None:
                words = "this API key is not known" if given else "an API key is needed: Authorization: Bearer KEY"
                raise RequestError(401, words, headers={"www-authenticate": "Bearer"})
        if self.open > self.limits.requests:
            raise RequestError(
                429, f"{self.limits.requests} requests are being answered already", headers={"retry-after": "1"}
            )


async def _drain(receive: Receive) -> None:
    """Take in what a client is still sending: many read the answer only when they have sent everything."""
    size = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            while size < DRAIN_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                if not message.get("more_body"):
                    return


async def refuse(error: RequestError, send: Send) -> None:
    """Send an error."""
    headers = {"content-type": "application/json", **error.headers}
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": error.body})


def is_loopback(host: str) -> bool:
    """Return whether a Host header names this machine."""
    name = host.rpartition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
    if name.rstrip(".").lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def impatient(seconds: float) -> type[HttpToolsProtocol]:
    """Return uvicorn's protocol with a bound on how long a client may take over a request's headers.

    uvicorn itself waits for ever for a client that sends a byte now and then.
    """

    class Impatient(HttpToolsProtocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            self.patience: asyncio.TimerHandle | None = None
            super().connection_made(transport)
            self._begin()

        def on_message_begin(self) -> None:
            self._begin()
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._end()
            super().on_headers_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end()
            super().connection_lost(exc)

        def _begin(self) -> None:
            self._end()
            self.patience = self.loop.call_later(seconds, self.transport.close)

        def _end(self) -> None:
            if self.patience is not None:
                self.patience.cancel()
                self.patience = None

    return Impatient
