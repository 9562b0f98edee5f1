"""A small server that speaks enough of OpenAI's API to stand behind a gateway, and misbehaves when it is asked to.

It answers a request with the request itself (`echoed`), so that a test sees what arrived. Words in a prompt make it do
things: "tokens N" streams N tokens, "slow S" waits S seconds first (between tokens, when it streams), "die" ends the
process, "fail" answers 500 with a path in it. `/seen` tells how many requests it got and how many were cancelled.
"""

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from composer.serving.engines import EngineSettings
from composer.zoo import Checkpoint


class StandIn:
    """The same as a kind of engine."""

    name = "stand_in"
    scores_prompts = True
    overhead = 0

    def missing(self) -> str | None:
        return None

    def unsupported(self, checkpoint: Checkpoint) -> str | None:
        return None

    def command(self, checkpoint: Checkpoint, settings: EngineSettings) -> list[str]:
        return [sys.executable, "-m", "tests.stand_in", str(settings.port), checkpoint.id]

    def environment(self, settings: EngineSettings) -> dict[str, str]:
        return {"STAND_IN_SECRET": settings.secret}


engine = StandIn()


def application(name: str, secret: str | None = None) -> FastAPI:
    app = FastAPI()
    seen = {"requests": 0, "cancelled": 0, "finished": 0, "open": 0, "asleep": 0}

    @app.get("/health")
    async def health() -> Response:
        return Response()

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"data": [{"id": name}]})

    @app.post("/sleep")
    async def sleep(level: int) -> Response:
        seen["asleep"] = level
        return Response()

    @app.post("/wake_up")
    async def wake_up() -> Response:
        seen["asleep"] = 0
        return Response()

    @app.get("/seen")
    async def counts() -> dict[str, int]:
        return seen

    @app.post("/v1/{path:path}")
    async def answer(path: str, request: Request) -> Response:
        if secret is not None and request.headers.get("authorization") != f"Bearer {secret}":
            return JSONResponse({"error": "who are you?"}, 401)
        seen["requests"] += 1
        if seen["asleep"]:
            return JSONResponse({"error": "asleep"}, 500)
        body = await request.json()
        prompt = json.dumps(body.get("prompt") or body.get("messages"))
        pause = float(found[1]) if (found := re.search(r"slow ([\d.]+)", prompt)) else 0.0
        if "die" in prompt and body.get("max_tokens") != 1:
            os._exit(9)
        if "fail" in prompt:
            return JSONResponse({"error": {"message": "Traceback: /home/somebody/engine.py"}}, 500)
        if "too long" in prompt:
            return JSONResponse({"error": {"message": "context length", "type": "x", "param": None, "code": 400}}, 400)
        if body.get("stream"):
            count = int(found[1]) if (found := re.search(r"tokens (\d+)", prompt)) else 3
            return StreamingResponse(stream(count, pause, break_at=2 if "break" in prompt else None),
                                     media_type="text/event-stream")  # fmt: skip
        gone = asyncio.ensure_future(_gone(request))
        await asyncio.wait({gone}, timeout=pause)
        if gone.done():
            seen["cancelled"] += 1
            return Response(status_code=499)
        gone.cancel()
        seen["finished"] += 1
        prompts = body["prompt"] if isinstance(body.get("prompt"), list) else [body.get("prompt")]
        choices = [{"index": i, "text": f"{name}: {one}", "finish_reason": "stop"} for i, one in enumerate(prompts)]
        if "chat" in path:
            choices = [{"index": 0, "message": {"role": "assistant", "content": name}, "finish_reason": "stop"}]
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        return JSONResponse({"id": "x", "object": path, "created": 0, "model": name, "choices": choices,
                             "usage": usage, "echoed": body})  # fmt: skip

    async def stream(count: int, pause: float, break_at: int | None) -> AsyncIterator[bytes]:
        seen["open"] += 1
        try:
            for number in range(count):
                if number == break_at:
                    os._exit(9)
                choice = {"index": 0, "text": f" {number}", "delta": {"content": f" {number}"}, "finish_reason": None}
                yield b"data: " + json.dumps({"id": "x", "model": name, "choices": [choice]}).encode() + b"\n\n"
                await asyncio.sleep(pause)
            usage = {"prompt_tokens": 3, "completion_tokens": count, "total_tokens": 3 + count}
            yield b"data: " + json.dumps({"id": "x", "choices": [], "usage": usage}).encode() + b"\n\n"
            yield b"data: [DONE]\n\n"
            seen["finished"] += 1
        except asyncio.CancelledError:
            seen["cancelled"] += 1
            raise
        finally:
            seen["open"] -= 1

    return app


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


if __name__ == "__main__":
    app = application(sys.argv[2], os.environ.get("STAND_IN_SECRET"))
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error")
