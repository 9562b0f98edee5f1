"""Asking an engine, and passing on what it answers."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

import aiohttp
import orjson
from fastapi import Request

from composer.serving.door import RequestError
from composer.serving.engines import Seat

T = TypeVar("T")

CONNECT = 5.0
"""Seconds an engine on this machine may take to accept a connection."""
IDLE = 2.0
"""Seconds a connection to an engine is kept for the next request; engines close theirs after five."""


class DownError(Exception):
    """An engine that does not answer."""


class GoneError(Exception):
    """A client that went away before it was answered."""


class Upstream:
    """The engines, as a client sees them."""

    def __init__(self, answer_seconds: float) -> None:
        """Prepare; nothing is connected before the first request."""
        self.answer_seconds = answer_seconds
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> "Upstream":
        # Whatever proxy the environment names, engines are on this machine: trust_env stays off.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE)
        timeout = aiohttp.ClientTimeout(total=self.answer_seconds, sock_connect=CONNECT)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def command(self, seat: Seat, what: str) -> None:
        """Tell an engine itself something, below its root.

        Raises:
            DownError: if it does not do it.
        """
        url = f"{seat.url.removesuffix('/v1')}/{what}"
        try:
            async with self._session.post(url, headers=seat.headers) as answer:
                if answer.status != 200:
                    raise DownError(f"{what}: {answer.status}")
        except aiohttp.ClientError as error:
            raise DownError(str(error)) from None

    async def send(self, seat: Seat, path: str, body: dict[str, Any]) -> aiohttp.ClientResponse:
        """Send a request; return the answer, of which only the head has been read.

        Raises:
            DownError: if the engine does not answer.
            TimeoutError: if it takes too long.
        """
        extra = dict(seat.body)
        # What tells experts in one engine apart goes over what the client sends, and its own salt is kept beside ours.
        if "vllm_xargs" in extra:
            given = body.get("vllm_xargs")
            extra["vllm_xargs"] = {**(given if isinstance(given, dict) else {}), **extra["vllm_xargs"]}
        if "cache_salt" in extra and body.get("cache_salt"):
            own = hashlib.sha256(str(body["cache_salt"]).encode()).hexdigest()  # of bounded length, as vLLM wants it
            extra["cache_salt"] = f"{extra['cache_salt']} {own}"
        content = orjson.dumps({**body, **extra, "model": seat.model})
        headers = {"content-type": "application/json", **seat.headers}
        for last in (False, True):
            try:
                return await self._session.post(f"{seat.url}/{path}", data=content, headers=headers)
            except (aiohttp.ServerDisconnectedError, ConnectionResetError) as error:
                # A kept connection may be closed at the moment it is used again.
                if last:
                    raise DownError(str(error)) from None
            except TimeoutError:
                raise
            except aiohttp.ClientError as error:
                raise DownError(str(error)) from None
        raise DownError


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Wait for work as long as the client does; when it goes away the work is cancelled.

    Raises:
        GoneError: if it went away.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise GoneError
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def read_body(request: Request, most: int, seconds: float) -> dict[str, Any]:
    """Return the JSON object a client sends.

    Raises:
        RequestError: 413 if it is larger than `most` bytes, 408 if it takes longer than `seconds`, 400 if it is none.
    """
    too_large = RequestError(413, f"the body is larger than {most / 1e6:g} MB", headers={"connection": "close"})
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > most:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > most:
                    raise too_large
    except TimeoutError:
        raise RequestError(
            408, f"the body did not arrive within {seconds:g} s", headers={"connection": "close"}
        ) from None
    try:
        body = orjson.loads(b"".join(parts))
    except orjson.JSONDecodeError as error:
        raise RequestError(400, f"the body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise RequestError(400, "the body must be a JSON object")
    return body


async def events(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Yield an answer's bytes as they come.

    Raises:
        DownError: if the engine stops in the middle.
        TimeoutError: if it takes too long.
    """
    try:
        async for chunk in answer.content.iter_any():
            yield chunk
    except TimeoutError:
        raise
    except aiohttp.ClientError as error:
        raise DownError(str(error)) from None
