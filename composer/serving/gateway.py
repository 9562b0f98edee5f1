"""The gateway: one OpenAI-compatible application that routes to the engines.

The composite answers under its own name, and each expert under its id. Every answer says who gave it, in the
header ``x-composer-expert``.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any, Protocol

import orjson
from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from starlette.exceptions import HTTPException

from composer import __version__
from composer.mixture.composite import Composite
from composer.registry import nearest
from composer.serving import openapi
from composer.serving.door import Door, RequestError
from composer.serving.engines import Seat
from composer.serving.keys import KeyFile
from composer.serving.metrics import CONTENT_TYPE, UP, Metrics
from composer.serving.settings import Limits, ServeSection
from composer.serving.turns import Turns
from composer.serving.upstream import DownError, GoneError, Upstream, events, read_body, unless_gone
from routers import Decision, Router
from routers.policy import Scope

JSON = "application/json"
CLOSED = 499
"""What servers write down for a client that went away; nobody is there to read it."""


class Engines(Protocol):
    """What the gateway knows of engines; `composer.serving.supervisor.Supervisor` is one."""

    def seat(self, expert: str) -> Seat | None:
        """Return where an expert is asked; None while it cannot be."""
        ...

    def states(self) -> dict[str, str]:
        """Return the state of each expert's engine: ready, remote, or something else."""
        ...

    def retry_after(self, expert: str) -> int:
        """Return in how many seconds it is worth asking again."""
        ...

    def sharing(self) -> Sequence[Sequence[str]]:
        """Return the names of engines that take turns."""
        ...

    def restarts(self) -> dict[str, int]:
        """Return how often each engine was restarted."""
        ...


def create_app(
    composite: Composite,
    router: Router | None,
    engines: Engines,
    section: ServeSection | None = None,
    *,
    keys: KeyFile | None = None,
    loopback: bool = True,
) -> "tuple[Door, Gateway]":
    """Return the application, and what is behind its door.

    Args:
        composite: What is served.
        router: Finds the expert of a prompt; None if there is a single expert.
        engines: Where each expert's engine listens.
        section: Limits, and what happens while an engine is down.
        keys: Who may ask; None for everybody.
        loopback: Whether it listens on loopback, and answers to names of this machine only.
    """
    section = section or ServeSection()
    gateway = Gateway(composite, router, engines, section)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with gateway.upstream:
            gateway.loop = asyncio.get_running_loop()
            yield

    title = f"Model Composer: {composite.name}"
    app = FastAPI(title=title, version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)

    @app.exception_handler(RequestError)
    async def _refused(request: Request, error: RequestError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def _unknown(request: Request, error: HTTPException) -> Response:
        words = {404: f"there is no {request.url.path}", 405: f"{request.method} is not for {request.url.path}"}
        message = words.get(error.status_code, str(error.detail))
        return error_response(RequestError(error.status_code, message, headers=dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def _broken(request: Request, error: Exception) -> Response:
        return error_response(RequestError(500, "an error of the gateway's own; its log says more"))

    @app.get("/health", responses=openapi.HEALTH)
    async def health() -> Response:
        """Say whether every engine answers."""
        states = engines.states()
        good = all(state in UP for state in states.values())
        shown = {name: "ok" if state in UP else state for name, state in states.items()}
        body = {"status": "ok" if good else "degraded", "engines": shown}
        return Response(orjson.dumps(body), 200 if good else 503, media_type=JSON)

    @app.get("/metrics", responses=openapi.METRICS)
    async def metrics() -> Response:
        """Give requests, latencies, routing, tokens and restarts in Prometheus' text format."""
        page = gateway.metrics.page(engines.states(), engines.restarts())
        return Response(page, headers={"content-type": CONTENT_TYPE})

    @app.get("/v1/models", responses=openapi.MODELS)
    async def models() -> Response:
        """List the composite and each expert."""
        data = [gateway.card(name) for name in gateway.names]
        return Response(orjson.dumps({"object": "list", "data": data}), media_type=JSON)

    @app.get("/v1/models/{model:path}", responses=openapi.MODEL)
    async def model(model: str) -> Response:
        """Describe the composite or an expert."""
        gateway.pinned({"model": model})
        return Response(orjson.dumps(gateway.card(model)), media_type=JSON)

    @app.post("/v1/route", responses=openapi.ROUTE, openapi_extra=openapi.body("route"))
    async def route(request: Request) -> Response:
        """Say which expert would answer each text, and why, without generating."""
        body = await gateway.read(request)
        texts = body.get("input")
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            if "messages" not in body:
                raise RequestError(400, "'input' must be a text or a list of texts, or give 'messages'", "input")
            texts = [_user_text(body, gateway.scope)]
        data = [decision.model_dump() for decision in await gateway.route(texts)]
        return Response(orjson.dumps({"data": data}), media_type=JSON)

    @app.post("/v1/chat/completions", responses=openapi.ANSWER, openapi_extra=openapi.body("chat"))
    async def chat(request: Request) -> Response:
        """Answer a chat; what of it decides the expert is for the policy to say."""
        body = await gateway.read(request)
        gateway.check_count(body, 1)
        expert = gateway.pinned(body, request)
        if expert is not None:
            return await gateway.forward(request, "chat/completions", body, expert)
        [decision] = await gateway.route([_user_text(body, gateway.scope)])
        return await gateway.forward(request, "chat/completions", body, decision.expert, decision)

    @app.post("/v1/completions", responses=openapi.ANSWER, openapi_extra=openapi.body("completion"))
    async def completions(request: Request) -> Response:
        """Complete one or more prompts; each finds its own expert."""
        body = await gateway.read(request)
        prompt = body.get("prompt")
        many = isinstance(prompt, list) and not all(isinstance(one, int) for one in prompt)
        gateway.check_count(body, len(prompt) if many and isinstance(prompt, list) else 1)
        expert = gateway.pinned(body, request)
        if expert is not None:
            return await gateway.forward(request, "completions", body, expert)
        return await gateway.complete(request, body)

    paths = frozenset(route.path for route in app.routes if hasattr(route, "path"))
    return Door(app, section.limits, gateway.metrics, paths, keys, loopback), gateway


class Gateway:
    """Routing and forwarding."""

    def __init__(self, composite: Composite, router: Router | None, engines: Engines, section: ServeSection) -> None:
        self.composite = composite
        self.router = router
        self.engines = engines
        self.limits: Limits = section.limits
        self.when_down = section.when_down
        self.metrics = Metrics()
        self.upstream = Upstream(section.limits.answer_seconds)
        self.turns = Turns(engines.sharing(), self._switch)
        self.loop: asyncio.AbstractEventLoop
        self.experts = [expert.id for expert in composite.experts]
        self.names = [composite.name, *self.experts]
        # One at a time: a second forward pass at the same moment would only slow down the first.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="router")

    @property
    def scope(self) -> Scope:
        """What of a chat is read."""
        return self.router.manifest.policy.scope if self.router else "last"

    def card(self, name: str) -> dict[str, Any]:
        """Return what `/v1/models` says of a model."""
        return {"id": name, "object": "model", "created": 0, "owned_by": "model-composer"}

    async def read(self, request: Request) -> dict[str, Any]:
        """Return the body of a request."""
        return await read_body(request, int(self.limits.body_mb * 1e6), self.limits.read_seconds)

    def check_count(self, body: dict[str, Any], prompts: int) -> None:
        """Refuse requests for absurdly many answers, which an engine would try to give.

        Raises:
            RequestError: 400.
        """
        for key in ("n", "best_of"):
            value = body.get(key)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise RequestError(400, f"'{key}' must be a whole number from 1 on", key)
        copies = max(body.get("n") or 1, body.get("best_of") or 1)
        if copies * prompts > self.limits.sequences:
            raise RequestError(
                400, f"{copies * prompts} answers in one request; at most {self.limits.sequences} are given", "n"
            )

    def pinned(self, body: dict[str, Any], request: Request | None = None) -> str | None:
        """Return the expert that a request names, in `model` or a header; None if it names the composite.

        Raises:
            RequestError: 404 if it names neither.
        """
        header = request.headers.get("x-composer-expert") if request else None
        name = header or body.get("model", self.composite.name)
        if name == self.composite.name:
            return None
        if name in self.experts:
            return str(name)
        raise RequestError(404, f"the model '{str(name)[:80]}' does not exist{nearest(str(name), self.names)}", "model")

    async def route(self, texts: Sequence[str]) -> list[Decision]:
        """Return the decision for each text."""
        router = self.router
        if router is None:
            only = self.experts[0]
            decision = Decision(expert=only, scores={only: 0.0}, confidence=1.0, margin=0.0, reason="the only expert")
            return [decision for _ in texts]
        loop, found = asyncio.get_running_loop(), []
        for text in texts:
            began = time.perf_counter()
            found.append(await loop.run_in_executor(self._reader, router.route, text))
            self.metrics.decided(found[-1], time.perf_counter() - began)
        return found

    async def complete(self, request: Request, body: dict[str, Any]) -> Response:
        """Complete prompts for the composite; prompts of one request may go to different experts."""
        prompt = body.get("prompt")
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) for text in prompts):
            raise RequestError(
                400,
                "'prompt' must be a text or a list of texts; token ids belong to one tokenizer, "
                "so name an expert as the model to send them",
                "prompt",
            )
        decisions = await self.route(prompts)
        chosen = [decision.expert for decision in decisions]
        if len(set(chosen)) == 1:
            least = min(decisions, key=lambda one: one.margin)
            return await self.forward(request, "completions", body, chosen[0], least)
        if body.get("stream"):
            raise RequestError(400, "prompts for different experts cannot be streamed in one request", "stream")
        groups = {expert: [i for i, name in enumerate(chosen) if name == expert] for expert in dict.fromkeys(chosen)}
        answers = await asyncio.gather(
            *(
                self.forward(
                    request, "completions", {**body, "prompt": [prompts[i] for i in places]}, one, decisions[places[0]]
                )
                for one, places in groups.items()
            )
        )
        return _joined(list(answers), list(groups.values()), list(groups), body, self.composite.name)

    async def forward(
        self, request: Request, path: str, body: dict[str, Any], expert: str, decision: Decision | None = None
    ) -> Response:
        """Pass a request on to an expert and its answer back, token by token if it is streamed.

        Args:
            request: The client's, which may go away.
            path: Below "/v1/".
            body: The request.
            expert: Who is to answer.
            decision: Why; None if the client named the expert.

        Raises:
            RequestError: 503 if the expert's engine is down and nobody may answer for it, 504 if it takes too long.
        """
        headers = {} if decision is None else {"x-composer-margin": f"{decision.margin:.4f}"}
        if decision is not None and decision.abstained:
            headers["x-composer-abstained"] = "true"
        for name in self._in_order(expert, decision):
            seat = self.engines.seat(name)
            if seat is None:
                continue
            headers["x-composer-expert"] = name
            if name != expert:
                self.metrics.failovers.labels(name).inc()
                headers["x-composer-instead-of"] = expert
            async with AsyncExitStack() as stack:
                try:
                    await stack.enter_async_context(self.turns.turn(seat.engine))
                    return await self._ask(request, path, body, name, seat, headers, stack)
                except DownError:
                    continue
                except GoneError:
                    return Response(status_code=CLOSED)
                except TimeoutError:
                    raise RequestError(
                        504, f"expert '{name}' did not answer within {self.limits.answer_seconds:g} s"
                    ) from None
        seconds = self.engines.retry_after(expert)
        raise RequestError(
            503,
            f"the engine of expert '{expert}' does not answer; try again in {seconds} s",
            headers={"retry-after": str(seconds), "x-composer-expert": expert},
        )

    def _in_order(self, expert: str, decision: Decision | None) -> list[str]:
        """Return who is asked: the expert, and where another may answer for it, the fallback and then by score."""
        if decision is None or self.when_down == "unavailable":
            return [expert]
        fallback = [self.router.manifest.policy.abstain_to] if self.router else []
        ranked = sorted(decision.scores, key=lambda name: -decision.scores[name])
        return list(dict.fromkeys([expert, *fallback, *ranked]))

    async def _switch(self, engine: str, awake: bool) -> None:
        """Wake an engine, or put it to sleep.

        Raises:
            DownError: if it does not answer.
        """
        seat = next((one for name in self.experts if (one := self.engines.seat(name)) and one.engine == engine), None)
        if seat is None:
            if awake:
                raise DownError(engine)
            return  # what is gone holds no memory
        await self.upstream.command(seat, "wake_up" if awake else "sleep?level=1")

    @contextmanager
    def room(self, engine: str) -> Iterator[None]:
        """Keep others asleep while an engine starts; for another thread than the gateway's."""
        entered, done = threading.Event(), asyncio.Event()

        async def hold() -> None:
            async with self.turns.alone(engine):
                entered.set()
                await done.wait()

        future = asyncio.run_coroutine_threadsafe(hold(), self.loop)
        while not entered.wait(0.1):
            if future.done():
                future.result()
        try:
            yield
        finally:
            self.loop.call_soon_threadsafe(done.set)
            future.result()

    async def _ask(
        self,
        request: Request,
        path: str,
        body: dict[str, Any],
        name: str,
        seat: Seat,
        headers: dict[str, str],
        stack: AsyncExitStack,
    ) -> Response:
        answer = await unless_gone(request, self.upstream.send(seat, path, body))
        if answer.status == 401:
            answer.release()
            raise RequestError(502, f"the engine of expert '{name}' refuses the gateway", headers=dict(headers))
        if answer.status >= 500:
            # What an engine says of its own faults may hold paths and traces.
            answer.release()
            if answer.status == 503:
                raise DownError(name)
            raise RequestError(502, f"the engine of expert '{name}' failed ({answer.status})", headers=dict(headers))
        media = answer.headers.get("content-type", JSON)
        if not media.startswith("text/event-stream"):
            try:
                content = await unless_gone(request, _whole(answer))
            finally:
                answer.release()
            if answer.status == 200:
                self.metrics.used(name, _usage(content))
            return Response(content, answer.status, headers, media_type=media)

        async def passed_on() -> AsyncIterator[bytes]:
            tail = b""
            try:
                async for chunk in events(answer):
                    tail = (tail + chunk)[-2048:]
                    yield chunk
            except (DownError, TimeoutError) as error:
                slow = isinstance(error, TimeoutError)
                words = "took too long" if slow else "stopped in the middle of the answer"
                failure = RequestError(504 if slow else 503, f"the engine of expert '{name}' {words}")
                yield b"data: " + failure.body + b"\n\n"
            self.metrics.used(name, _last_usage(tail))

        held = stack.pop_all()
        # Also when the client goes away: closing the connection makes the engine stop generating.
        held.callback(answer.close)
        return Held(held, passed_on(), answer.status, headers, media_type=media)


class Held(StreamingResponse):
    """A stream that holds on to something until it has ended, in whatever way, or has not even begun."""

    def __init__(self, held: AsyncExitStack, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.held = held

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the stream."""
        async with self.held:
            await super().__call__(scope, receive, send)


async def _whole(answer: Any) -> bytes:
    return b"".join([chunk async for chunk in events(answer)])


def _usage(content: bytes) -> dict[str, object] | None:
    try:
        usage = orjson.loads(content).get("usage")
    except (orjson.JSONDecodeError, AttributeError):
        return None
    return usage if isinstance(usage, dict) else None


def _last_usage(tail: bytes) -> dict[str, object] | None:
    """Return the usage in the last events of a stream, where the client asked for it."""
    for line in reversed(tail.split(b"\n")):
        if line.startswith(b"data: {") and b'"usage":{' in line.replace(b" ", b""):
            return _usage(line[len(b"data: ") :])
    return None


def _joined(
    answers: list[Response],
    indices: list[list[int]],
    experts: list[str],
    body: dict[str, Any],
    name: str,
) -> Response:
    """Put the choices of several experts into one completion, in the order of the prompts."""
    for answer in answers:
        if answer.status_code != 200:
            return answer
    parts = [orjson.loads(bytes(answer.body)) for answer in answers]
    per_prompt = max(1, int(body.get("n") or 1))
    choices = []
    for part, places in zip(parts, indices, strict=True):
        for choice in part["choices"]:
            place, copy = divmod(choice["index"], per_prompt)
            choices.append({**choice, "index": places[place] * per_prompt + copy})
    usage = {
        key: sum((part.get("usage") or {}).get(key) or 0 for part in parts)
        for key in ("prompt_tokens", "completion_tokens", "total_tokens")
    }
    joined = {**parts[0], "model": name, "choices": sorted(choices, key=lambda c: c["index"]), "usage": usage}
    by = ",".join(
        answer.headers.get("x-composer-expert", expert) for answer, expert in zip(answers, experts, strict=True)
    )
    return Response(orjson.dumps(joined), headers={"x-composer-expert": by}, media_type=JSON)


def _user_text(body: dict[str, Any], scope: Scope) -> str:
    """Return the text of the user messages that decide the expert; see `user_texts`."""
    texts = user_texts(body)
    return {"last": texts[-1], "first": texts[0], "conversation": "\n".join(texts)}[scope]


def user_texts(body: dict[str, Any]) -> list[str]:
    """Return the texts of a chat's user messages.

    Raises:
        RequestError: 400 if there is none.
    """
    messages = body.get("messages")
    if not isinstance(messages, list):
        raise RequestError(400, "'messages' must be a list", "messages")
    asked = [one.get("content") for one in messages if isinstance(one, dict) and one.get("role") == "user"]
    texts = [
        one if isinstance(one, str) else "\n".join(str(part.get("text", "")) for part in one if isinstance(part, dict))
        for one in asked
        if isinstance(one, (str, list))
    ]
    if not texts:
        raise RequestError(400, "'messages' holds no user message with text", "messages")
    return texts


def error_response(error: RequestError) -> Response:
    """Return an error in OpenAI's shape."""
    return Response(error.body, error.status, error.headers, media_type=JSON)
