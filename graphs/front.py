"""The front of the endpoint: the model name `composer`, and behind it whatever composite is served now.

A chat with that name is a conversation as in `model-composer chat`. Clients send everything that was said with each
message; the conversation that a message belongs to is the one that began with the same first message, so that it
survives a restart, and a chat that holds one message only begins it anew.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import orjson
from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse

from composer import __version__
from composer.artefacts import digest
from composer.chat.calls import Cancel
from composer.chat.draft import Draft, begun
from composer.errors import ComposerError
from composer.serving.door import Door, RequestError
from composer.serving.gateway import JSON, error_response, user_texts
from composer.serving.keys import KeyFile
from composer.serving.metrics import Metrics
from composer.serving.server import Server
from composer.serving.settings import Limits
from composer.serving.upstream import DownError, GoneError, events, read_body, unless_gone
from graphs.background import Background
from graphs.conversation import Conversation, Told

NAME = "composer"
"""The model that composes."""
PATIENCE = 40.0
"""Seconds until an answer that is not streamed says that the work goes on; clients give up after some minutes."""
PULSE = 10.0
"""Seconds between signs of life in a stream."""
CONNECT = 5.0
PASSED = {"content-type", "accept", "x-composer-expert"}
"""Headers of a request that are passed on; those of the connection are not, and keys open this door only."""
KEPT = {"content-type", "retry-after"}
"""Headers of an answer that are passed back, with all that begin as below."""
OWN = "x-composer-"

Open = Callable[[str], Conversation]
Served = Callable[[], Server | None]


class Front:
    """Conversations by their first message, and the way to the composite."""

    def __init__(self, open_conversation: Open, served: Served, limits: Limits) -> None:
        """Prepare; nothing is opened before the first message.

        Args:
            open_conversation: Gives a conversation by its name.
            served: Gives what serves a composite now; None while there is none.
            limits: What one client may ask.
        """
        self._open, self.served, self.limits = open_conversation, served, limits
        self._work: dict[str, Background] = {}
        self._lock = threading.Lock()
        self._session: aiohttp.ClientSession

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Hold connections to the composite's own gateway."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT)
        async with aiohttp.ClientSession(timeout=timeout, auto_decompress=False) as self._session:
            yield

    def hear(self, body: dict[str, Any]) -> Background:
        """Take in what a chat says last; return the work that answers it.

        Raises:
            RequestError: if there is nothing to answer.
        """
        if body.get("n") not in (None, 1):
            raise RequestError(400, f"'n' must be 1 for the model '{NAME}'", "n")
        texts = user_texts(body)
        name = f"{NAME}-{digest([str(body.get('user', '')), texts[0]])[:16]}"
        with self._lock:
            self._work = {key: one for key, one in self._work.items() if one.running}
            going = self._work.get(name)
            if going is None:
                work = self._work[name] = Background(self._open(name))
                if len(texts) == 1:
                    work.conversation.forget()
                work.start(work.conversation.say(texts[-1]))
                return work
        return self._while_running(going, texts[-1])

    def _while_running(self, work: Background, said: str) -> Background:
        """Return what answers a message that comes while work is going on: a cancellation, or how far it is."""
        context = work.conversation.context
        kept = work.conversation.state.get("draft")
        draft = Draft.model_validate(kept) if kept else begun(context.desk.shelf)
        wanted = context.driver.understand(said, draft, context.desk.shelf).calls
        text = f"{work.doing} is going on; ask again for its state, or say 'cancel'"
        if any(isinstance(call, Cancel) for call in wanted):
            text = "stopping" if work.conversation.cancel() else "nothing can be stopped yet"
        beside = Background(work.conversation)
        beside.start(iter([Told(kind="say", text=text)]))
        return beside

    async def whole(self, work: Background) -> Response:
        """Answer with all that is said, or with how far the work is."""
        ended = await asyncio.to_thread(work.wait, PATIENCE)
        text = _unrepeated(work.told) or "done"
        if not ended:
            text = f"{text}\n({work.doing} …; ask 'status')".removeprefix("done\n")
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        return Response(
            orjson.dumps({**_head("chat.completion"), "choices": [choice], "usage": usage}), media_type=JSON
        )

    async def streamed(self, work: Background) -> AsyncIterator[bytes]:
        """Yield what is said as it is said, and each stage that begins; who goes away misses the rest only."""
        head = _head("chat.completion.chunk")
        yield _event(head, {"role": "assistant", "content": ""})
        seen, stage, last = 0, "", ""
        while True:
            going = work.running
            news = await asyncio.to_thread(work.news, seen, PULSE)
            seen += len(news)
            for one in news:
                if one.step is not None:
                    if one.step.stage != stage:
                        yield _event(head, {"content": f"_{one.step.stage} …_\n\n"})
                    stage = one.step.stage
                elif one.text != last:  # a question that has just been said is not said again
                    last = one.text
                    yield _event(head, {"content": f"{one.text}\n\n"})
            if not going and not news:
                break
            if not news:
                yield b": working\n\n"
        yield _event(head, {}, "stop")
        yield b"data: [DONE]\n\n"

    async def models(self) -> Response:
        """List this model, and those of the composite."""
        card = {"id": NAME, "object": "model", "created": 0, "owned_by": "model-composer"}
        data = [card]
        server = self.served()
        if server is not None:
            endpoint = server.endpoint
            async with self._session.get(f"{endpoint.url}/v1/models", headers=endpoint.headers) as answer:
                data += (await answer.json())["data"]
        return Response(orjson.dumps({"object": "list", "data": data}), media_type=JSON)

    async def passed_on(self, request: Request, content: bytes) -> Response:
        """Pass a request on to the composite, and its answer back as it comes.

        Raises:
            RequestError: 404 if nothing is served, 503 if it does not answer.
        """
        server = self.served()
        if server is None:
            raise RequestError(
                404, f"no composite is served yet; ask the model '{NAME}' for one", "model", {"retry-after": "5"}
            )
        endpoint = server.endpoint
        headers = {name: value for name, value in request.headers.items() if name in PASSED} | endpoint.headers
        asked = self._session.request(
            request.method, f"{endpoint.url}{request.url.path}", data=content, headers=headers
        )
        try:
            answer = await unless_gone(request, asked)
        except GoneError:
            return Response(status_code=499)
        except aiohttp.ClientError as error:
            raise RequestError(
                503, f"{endpoint.model} does not answer: {error}", headers={"retry-after": "5"}
            ) from None
        kept = {
            name: value
            for name, value in answer.headers.items()
            if name.lower() in KEPT or name.lower().startswith(OWN)
        }
        return StreamingResponse(_bytes(answer), answer.status, kept)


def create_front(
    zoo: Path | None, root: Path, url: str, served: Served, limits: Limits, *, keys: KeyFile | None, loopback: bool
) -> Door:
    """Return the application.

    Args:
        zoo: What is composed from: a recipe or a folder of checkpoints; by default the quickstart recipe.
        root: Where runs live.
        url: The base address that the application will be served at.
        served: Gives what serves a composite now; None while there is none.
        limits: What one client may ask.
        keys: Who may ask; None for everybody.
        loopback: Whether it listens on loopback, and answers to names of this machine only.

    Raises:
        RecipeError: if there is no such zoo.
    """
    front = Front(lambda name: Conversation(name, root=root, zoo=zoo, front=url), served, limits)
    Conversation(NAME, root=root, zoo=zoo)  # what is wrong with the zoo is told now

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with front.connected():
            yield

    app = FastAPI(title="Model Composer", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)

    @app.exception_handler(RequestError)
    async def _refused(request: Request, error: RequestError) -> Response:
        return error_response(error)

    @app.exception_handler(ComposerError)
    async def _wrong(request: Request, error: ComposerError) -> Response:
        return error_response(RequestError(400, str(error)))

    @app.get("/health")
    async def health(request: Request) -> Response:
        """Say whether the composite's engines answer, if one is served."""
        if front.served() is None:
            return Response(orjson.dumps({"status": "ok", "engines": {}}), media_type=JSON)
        return await front.passed_on(request, b"")

    @app.get("/v1/models")
    async def models() -> Response:
        """List this model, and those of the composite."""
        return await front.models()

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        """Compose, or let the composite answer."""
        body = await read_body(request, int(limits.body_mb * 1e6), limits.read_seconds)
        if body.get("model") != NAME:
            return await front.passed_on(request, orjson.dumps(body))
        work = await asyncio.to_thread(front.hear, body)
        if body.get("stream"):
            return StreamingResponse(front.streamed(work), media_type="text/event-stream")
        return await front.whole(work)

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def others(request: Request) -> Response:
        """Pass everything else on."""
        if request.method == "GET":
            return await front.passed_on(request, b"")
        body = await read_body(request, int(limits.body_mb * 1e6), limits.read_seconds)
        return await front.passed_on(request, orjson.dumps(body))

    paths = frozenset(("/health", "/v1/models", "/v1/chat/completions"))
    return Door(app, limits, Metrics(), paths, keys, loopback)


async def _bytes(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Yield an answer's bytes; the connection is given up with whoever reads them."""
    try:
        async for chunk in events(answer):
            yield chunk
    except DownError:
        return
    finally:
        answer.close()


def _head(kind: str) -> dict[str, Any]:
    now = time.time()
    return {"id": f"chatcmpl-{int(now * 1e6):x}", "object": kind, "created": int(now), "model": NAME}


def _event(head: dict[str, Any], delta: dict[str, str], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
    return b"data: " + orjson.dumps({**head, "choices": [choice]}) + b"\n\n"


def _unrepeated(told: list[Told]) -> str:
    """Return what has been said; a question that has just been said is not said again."""
    texts = [one.text for one in told if one.step is None]
    return "\n\n".join(text for place, text in enumerate(texts) if place == 0 or text != texts[place - 1])
