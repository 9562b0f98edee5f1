"""The gateway: one OpenAI-compatible application that routes to the engines.

The composite answers under its own name, and each expert under its id. Every answer says who gave it, in the
header ``x-composer-expert``.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from composer import __version__
from composer.mixture.composite import Composite
from composer.registry import nearest
from routers import Decision, Router
from routers.policy import Scope


class RequestError(Exception):
    """A request that cannot be answered; becomes an error in OpenAI's shape."""

    def __init__(self, status: int, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.parameter = status, message, parameter


class EngineAddress:
    """Where an expert is served, and what it is called there."""

    def __init__(self, url: str, model: str) -> None:
        self.url, self.model = url, model


def create_app(composite: Composite, router: Router | None, engines: dict[str, EngineAddress]) -> FastAPI:
    """Return the application.

    Args:
        composite: What is served.
        router: Finds the expert of a prompt; None if there is a single expert.
        engines: Where each expert's engine listens.
    """
    gateway = _Gateway(composite, router, engines)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=10.0),
            limits=httpx.Limits(max_connections=None),
            trust_env=False,  # engines are on loopback, whatever proxy the environment names
        ) as client:
            gateway.client = client
            yield

    app = FastAPI(title=f"Model Composer: {composite.name}", version=__version__, lifespan=lifespan)

    @app.exception_handler(RequestError)
    async def _refused(request: Request, error: RequestError) -> JSONResponse:
        return _error(error.status, error.message, error.parameter)

    @app.get("/health")
    async def health() -> Response:
        """Say whether every engine answers."""
        states = await gateway.health()
        good = all(state == "ok" for state in states.values())
        return JSONResponse({"status": "ok" if good else "degraded", "engines": states}, 200 if good else 503)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the composite and each expert."""
        names = [composite.name, *(expert.id for expert in composite.experts)]
        return {
            "object": "list",
            "data": [{"id": name, "object": "model", "created": 0, "owned_by": "model-composer"} for name in names],
        }

    @app.post("/v1/route")
    async def route(request: Request) -> dict[str, Any]:
        """Say which expert would answer each text, without generating: {"input": text or list of texts}."""
        body = await _body(request)
        texts = body.get("input")
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise RequestError(400, "'input' must be a text or a list of texts", "input")
        return {"data": [decision.model_dump() for decision in await gateway.route(texts)]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        """Answer a chat; what of it decides the expert is for the policy to say."""
        body = await _body(request)
        expert = gateway.named(body)
        if expert is None:
            decision = (await gateway.route([_user_text(body, gateway.scope)]))[0]
            return await gateway.forward("chat/completions", body, decision.expert, decision.margin)
        return await gateway.forward("chat/completions", body, expert)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        """Complete one or more prompts; each finds its own expert."""
        body = await _body(request)
        expert = gateway.named(body)
        if expert is not None:
            return await gateway.forward("completions", body, expert)
        return await gateway.complete(body)

    return app


class _Gateway:
    """Routing and forwarding."""

    def __init__(self, composite: Composite, router: Router | None, engines: dict[str, EngineAddress]) -> None:
        self.composite = composite
        self.router = router
        self.engines = engines
        self.client: httpx.AsyncClient

    @property
    def scope(self) -> Scope:
        """What of a chat is read."""
        return self.router.manifest.policy.scope if self.router else "last"

    def named(self, body: dict[str, Any]) -> str | None:
        """Return the expert that a request names, None if it names the composite.

        Raises:
            RequestError: 404 if it names neither.
        """
        name = body.get("model", self.composite.name)
        if name == self.composite.name:
            return None
        if name in self.engines:
            return str(name)
        known = [self.composite.name, *self.engines]
        raise RequestError(404, f"the model '{name}' does not exist{nearest(str(name), known)}", "model")

    async def route(self, texts: list[str]) -> list[Decision]:
        """Return the decision for each text."""
        if self.router is None:
            only = self.composite.experts[0].id
            decision = Decision(expert=only, scores={only: 0.0}, confidence=1.0, margin=0.0, reason="the only expert")
            return [decision for _ in texts]
        return [await run_in_threadpool(self.router.route, text) for text in texts]

    async def health(self) -> dict[str, str]:
        """Return the state of each engine."""

        async def state(address: EngineAddress) -> str:
            try:
                answer = await self.client.get(f"{address.url}/health", timeout=5)
                return "ok" if answer.status_code == 200 else f"status {answer.status_code}"
            except httpx.HTTPError:
                return "unreachable"

        states = await asyncio.gather(*(state(address) for address in self.engines.values()))
        return dict(zip(self.engines, states, strict=True))

    async def complete(self, body: dict[str, Any]) -> Response:
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
            return await self.forward("completions", body, chosen[0], min(d.margin for d in decisions))
        if body.get("stream"):
            raise RequestError(400, "prompts for different experts cannot be streamed in one request", "stream")
        groups = {expert: [i for i, name in enumerate(chosen) if name == expert] for expert in dict.fromkeys(chosen)}
        answers = await asyncio.gather(
            *(
                self.post("completions", {**body, "prompt": [prompts[i] for i in indices]}, expert)
                for expert, indices in groups.items()
            )
        )
        return _joined(list(answers), list(groups.values()), list(groups), body, self.composite.name)

    async def post(self, path: str, body: dict[str, Any], expert: str) -> httpx.Response:
        """Send a request to an expert's engine.

        Raises:
            RequestError: 503 if the engine cannot be reached.
        """
        address = self.engines[expert]
        try:
            return await self.client.post(f"{address.url}/v1/{path}", json={**body, "model": address.model})
        except httpx.TransportError:
            raise RequestError(503, f"the engine of expert '{expert}' does not answer; try again later") from None

    async def forward(self, path: str, body: dict[str, Any], expert: str, margin: float | None = None) -> Response:
        """Pass a request on to an expert and its answer back, token by token if it is streamed."""
        headers = {"x-composer-expert": expert}
        if margin is not None:
            headers["x-composer-margin"] = f"{margin:.4f}"
        if not body.get("stream"):
            answer = await self.post(path, body, expert)
            media = answer.headers.get("content-type")
            return Response(answer.content, answer.status_code, headers, media_type=media)
        address = self.engines[expert]
        request = self.client.build_request("POST", f"{address.url}/v1/{path}", json={**body, "model": address.model})
        try:
            stream = await self.client.send(request, stream=True)
        except httpx.TransportError:
            raise RequestError(503, f"the engine of expert '{expert}' does not answer; try again later") from None

        async def passed_on() -> AsyncIterator[bytes]:
            try:
                async for chunk in stream.aiter_raw():
                    yield chunk
            except httpx.TransportError:
                failure = _error(503, f"the engine of expert '{expert}' stopped in the middle of the answer")
                yield b"data: " + bytes(failure.body) + b"\n\n"
            finally:
                # Also when the client goes away: closing the connection makes the engine stop generating.
                await stream.aclose()

        media = stream.headers.get("content-type", "text/event-stream")
        return StreamingResponse(passed_on(), stream.status_code, headers, media_type=media)


def _joined(
    answers: list[httpx.Response],
    indices: list[list[int]],
    experts: list[str],
    body: dict[str, Any],
    name: str,
) -> Response:
    """Put the choices of several experts into one completion, in the order of the prompts."""
    for answer, expert in zip(answers, experts, strict=True):
        if answer.status_code != 200:
            media = answer.headers.get("content-type")
            return Response(answer.content, answer.status_code, {"x-composer-expert": expert}, media_type=media)
    parts = [answer.json() for answer in answers]
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
    return JSONResponse(joined, headers={"x-composer-expert": ",".join(experts)})


async def _body(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.body())
    except (ValueError, UnicodeDecodeError):
        raise RequestError(400, "the body is not valid JSON") from None
    if not isinstance(body, dict):
        raise RequestError(400, "the body must be a JSON object")
    return body


def _user_text(body: dict[str, Any], scope: Scope) -> str:
    """Return the text of the user messages that decide the expert.

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
    return {"last": texts[-1], "first": texts[0], "conversation": "\n".join(texts)}[scope]


def _error(status: int, message: str, parameter: str | None = None) -> JSONResponse:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    body = {"error": {"message": message, "type": kind, "param": parameter, "code": status}}
    return JSONResponse(body, status)
