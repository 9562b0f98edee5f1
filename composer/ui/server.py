"""The page's server: on loopback, for this machine's own pages only."""

import signal
import socket
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import click
import nicegui
import uvicorn
from fastapi import FastAPI
from fastapi.responses import HTMLResponse, Response
from nicegui import ui

from composer.chat.shelf import lm_eval_tasks
from composer.errors import ServeError
from composer.runs import Run
from composer.serving.door import is_loopback
from composer.ui.page import Page
from composer.ui.work import Work

HOST = "127.0.0.1"
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; connect-src 'self' ws://{host}; worker-src 'self' blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What the browser lets the page do: nothing that leaves this server. (The library compiles its templates there.)"""
REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"


def serve(work: Work, port: int) -> None:
    """Serve the page until Ctrl-C or SIGTERM.

    Args:
        work: The conversation; it is closed by whoever opened it.
        port: Where to listen; 0 takes any free port.

    Raises:
        ServeError: if the port is taken.
    """
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as error:
        raise ServeError(f"port {port}: {error.strerror}; give another with --port") from None
    config = uvicorn.Config(
        Gate(_app(work)), log_level="error", access_log=False, timeout_graceful_shutdown=2, ws_max_size=1 << 22
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # uvicorn raises the signal again after it has stopped
    click.echo(f"http://{HOST}:{listener.getsockname()[1]}/ shows '{work.conversation.name}'; Ctrl-C stops it")
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])


def _warm(work: Work) -> None:
    """Import what a first answer and the first figures need."""
    import composer.report.figures  # noqa: F401
    from composer.chat.builtin import BuiltIn

    shelf = work.conversation.context.desk.shelf
    BuiltIn().understand("list", work.standing.draft, shelf, None)
    lm_eval_tasks()


def _app(work: Work) -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/report/{name}")
    async def report(name: str) -> Response:
        """Show the whole report of a run of this conversation."""
        known = {Run(work.conversation.root / path).path for path in (*work.standing.finished, work.standing.run or "")}
        for path in known:
            if path.name == name and (path / "report.html").is_file():
                return HTMLResponse(
                    (path / "report.html").read_text(), headers={"content-security-policy": REPORT_POLICY}
                )
        return Response("there is no such report", 404, media_type="text/plain")

    @ui.page("/")
    def index() -> None:
        Page(work).build()

    # No sooner: the library looks through all objects when it starts, which breaks tuples that threads are making.
    nicegui.app.on_startup(threading.Thread(target=_warm, args=(work,), daemon=True).start)
    ui.run_with(
        app,
        title="Model Composer",
        favicon="🎼",
        show_welcome_message=False,
        reconnect_timeout=10,
        binding_refresh_interval=None,
    )
    return app


class Gate:
    """Refuses what another site's page sends, and tells the browser that ours goes nowhere else."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if not is_loopback(host) or (origin is not None and urlsplit(origin).netloc != host):
            await _refuse(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = list(message["headers"])
                if not any(name == b"content-security-policy" for name, _ in given):
                    given.append((b"content-security-policy", POLICY.format(host=host).encode("latin-1")))
                given += [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": given}
            await send(message)

        await self.app(scope, receive, guarded)


async def _refuse(scope: Message, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008})
        return
    headers = [(b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": b"this page answers to its own machine and its own pages only\n"})
