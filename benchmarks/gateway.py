"""What the gateway costs: first tokens and throughput, with and without it, before the same engine in the same run.

    python benchmarks/gateway.py [latency throughput stand_in] [--model DIR] [--rounds 5]

MODEL (by default the quickstart's base) is served twice as two experts by real engines; requests go straight to an
engine and through the gateway, in turns. `latency`: added time to the first token at 1, 8 and 32 clients, with
the expert named and with the prompt routed (where the router's own time is taken off). `throughput`: answers of 32
tokens, streamed and not. `stand_in`: requests a second before an engine that answers at once, by the wall clock and by
the gateway's own CPU time. The last is what one core could do, if load generator and engine were elsewhere.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import aiohttp
import httpx
import psutil

from composer.artefacts import Store
from composer.cli import _quiet_libraries
from composer.mixture import Expert, Known, build_composite
from composer.mixture.settings import MixtureSection, RouterSection
from composer.serving.engines import ENGINES
from composer.serving.server import Server
from composer.serving.settings import ServeSection
from composer.zoo import inspect_checkpoint

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = {
    "stories": ("Once upon a time there was a dog.", "The little girl went to the park.", "One day a boy found a box."),
    "sums": ("What is 12 plus 30?", "A box holds 3 rows of 4 eggs. How many?", "How much is 15% of 80?"),
}
PROMPT = "One day a girl named Lily went to the park with her mother and found"
NOBODY = Known(*(lambda *_: sys.exit("not needed") for _ in range(3)))


def composite(model: Path, store: Store) -> Path:
    """Build a composite of one model under two names, routed by its own first layer."""
    experts = tuple(
        Expert(id=name, checkpoint=inspect_checkpoint(name, model, store), members=(name,), examples=texts, reason="")
        for name, texts in EXAMPLES.items()
    )
    return build_composite(
        "mix", experts, {}, MixtureSection(router=RouterSection(abstain_to="stories")), store, NOBODY
    )


class Way:
    """One way to ask: an address, a model name and what proves who asks."""

    def __init__(self, name: str, url: str, model: str, headers: dict[str, str] | None = None) -> None:
        self.name, self.url, self.model, self.headers = name, url, model, headers or {}

    async def ask(self, session: aiohttp.ClientSession, *, tokens: int, stream: bool, salt: int) -> float:
        """Ask once; return seconds to the first token (or to the answer, where it is not streamed)."""
        body = {"model": self.model, "prompt": f"{PROMPT} {salt}", "max_tokens": tokens, "temperature": 0,
                "stream": stream, "ignore_eos": True}  # fmt: skip
        began, first = time.perf_counter(), 0.0
        async with session.post(f"{self.url}/completions", json=body, headers=self.headers) as answer:
            async for _ in answer.content.iter_any():
                first = first or time.perf_counter() - began
            if answer.status != 200:
                raise SystemExit(f"{self.name}: {answer.status}")
        return first


async def load(way: Way, clients: int, each: int, *, tokens: int, stream: bool) -> tuple[list[float], float]:
    """Let clients ask one after another; return all first-token times, and the seconds it took together."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def client(number: int) -> list[float]:
            return [
                await way.ask(session, tokens=tokens, stream=stream, salt=1000 * number + turn) for turn in range(each)
            ]

        began = time.perf_counter()
        found = await asyncio.gather(*(client(number) for number in range(clients)))
        return [one for part in found for one in part], time.perf_counter() - began


def percentile(values: list[float], share: float) -> float:
    """Return a percentile in milliseconds."""
    return round(1000 * sorted(values)[min(len(values) - 1, int(share * len(values)))], 2)


def routing_seconds(server: Server) -> tuple[float, float]:
    """Return the sum and number of the router's own times."""
    lines = httpx.get(f"{server.endpoint.url}/metrics").text.splitlines()
    values = {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("composer_routing_seconds")}
    return values["composer_routing_seconds_sum"], values["composer_routing_seconds_count"]


def latency(server: Server, ways: list[Way], rounds: int) -> None:
    """Show what is added to the time to the first token."""
    for clients in (1, 8, 32):
        found: dict[str, list[float]] = {way.name: [] for way in ways}
        before = routing_seconds(server)
        for _ in range(rounds):
            for way in ways:
                first, _ = asyncio.run(load(way, clients, max(2, 24 // clients), tokens=2, stream=True))
                found[way.name] += first
        after = routing_seconds(server)
        router = 1000 * (after[0] - before[0]) / (after[1] - before[1])
        row = {name: {"p50_ms": percentile(v, 0.5), "p95_ms": percentile(v, 0.95)} for name, v in found.items()}
        alone, named, routed = (row[way.name] for way in ways)
        print(json.dumps({
            "part": "latency", "clients": clients, "requests": len(found[ways[0].name]), **row,
            "added_p50_ms": round(named["p50_ms"] - alone["p50_ms"], 2),
            "added_p95_ms": round(named["p95_ms"] - alone["p95_ms"], 2),
            "router_ms": round(router, 2),
            "routed_added_p50_ms": round(routed["p50_ms"] - alone["p50_ms"] - router, 2),
        }), flush=True)  # fmt: skip


def throughput(ways: list[Way], rounds: int) -> None:
    """Show tokens per second with and without the gateway."""
    for stream in (True, False):
        for clients in (1, 8, 32):
            rates: dict[str, list[float]] = {way.name: [] for way in ways[:2]}
            for turn in range(rounds):
                for way in (ways[:2], ways[1::-1])[turn % 2]:
                    each = max(1, 16 // clients)
                    _, seconds = asyncio.run(load(way, clients, each, tokens=32, stream=stream))
                    rates[way.name].append(clients * each * 32 / seconds)
            alone, through = (statistics.median(rates[way.name]) for way in ways[:2])
            ratios = [b / a for a, b in zip(rates[ways[0].name], rates[ways[1].name], strict=True)]
            print(json.dumps({
                "part": "throughput", "stream": stream, "clients": clients, "alone_tokens_s": round(alone),
                "gateway_tokens_s": round(through), "ratio": round(statistics.median(ratios), 3),
                "ratios": [round(min(ratios), 3), round(max(ratios), 3)],
            }), flush=True)  # fmt: skip


def stand_in(directory: Path, logs: Path) -> None:
    """Show requests per second before an engine that answers at once."""
    ENGINES.register("at_once", AtOnce())
    command = [sys.executable, __file__, "--serve", str(directory), str(logs)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        way = Way("gateway", process.stdout.readline().strip() + "/v1", "stories")
        gateway = psutil.Process(process.pid)
        for clients in (1, 8, 32):
            asyncio.run(load(way, clients, 20, tokens=1, stream=False))
            before = gateway.cpu_times()
            count = 3000 // clients * clients
            _, seconds = asyncio.run(load(way, clients, count // clients, tokens=1, stream=False))
            after = gateway.cpu_times()
            spent = after.user + after.system - before.user - before.system
            print(json.dumps({
                "part": "stand_in", "clients": clients, "requests_s": round(count / seconds),
                "requests_per_cpu_second": round(count / spent),
            }), flush=True)  # fmt: skip
        process.stdin.close()  # type: ignore[union-attr]


class AtOnce:
    """A kind of engine that answers everything with one word."""

    name, scores_prompts, overhead = "at_once", True, 0

    def missing(self) -> None:
        """It is here."""

    def unsupported(self, checkpoint: object) -> None:
        """It takes everything."""

    def command(self, checkpoint: object, settings: object) -> list[str]:
        """Run this file."""
        return [sys.executable, __file__, "--engine", str(settings.port)]  # type: ignore[attr-defined]

    def environment(self, settings: object) -> dict[str, str]:
        """Need nothing."""
        return {}


def engine(port: int) -> None:
    """Answer everything with one word."""
    import uvicorn

    choice = {"index": 0, "text": " hi", "finish_reason": "stop"}
    usage = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
    content = json.dumps({"id": "x", "object": "text_completion", "choices": [choice], "usage": usage}).encode()

    async def app(scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        if scope["type"] == "http":
            while (await receive()).get("more_body"):
                pass
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": content})

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error", access_log=False, lifespan="off")


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["latency", "throughput", "stand_in"])
    parser.add_argument("--model", type=Path, default=ROOT / "recipes" / "quickstart" / "models" / "stories")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--engine", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        engine(options.engine)
        return
    _quiet_libraries()
    if options.serve:
        ENGINES.register("at_once", AtOnce())
        with Server(options.serve[0], ServeSection(engine="at_once", port=0), options.serve[1]) as server:
            print(server.endpoint.url, flush=True)
            sys.stdin.read()
        return
    with tempfile.TemporaryDirectory() as home:
        directory = composite(options.model, Store(Path(home) / "store"))
        if {"latency", "throughput"} & set(options.parts):
            threads = max(1, (os.cpu_count() or 1) // 2)
            print(json.dumps({"model": options.model.name, "threads_an_engine": threads}), flush=True)
            with Server(directory, ServeSection(port=0), Path(home) / "logs") as server:
                seat = server.supervisor.seat("stories")
                assert seat is not None
                url = f"{server.endpoint.url}/v1"
                ways = [
                    Way("engine alone", seat.url, seat.model, dict(seat.headers)),
                    Way("expert named", url, "stories"),
                    Way("routed", url, "mix"),
                ]
                for way in ways:
                    asyncio.run(load(way, 4, 4, tokens=8, stream=True))
                if "latency" in options.parts:
                    latency(server, ways, options.rounds)
                if "throughput" in options.parts:
                    throughput(ways, options.rounds)
        if "stand_in" in options.parts:
            stand_in(directory, Path(home) / "logs")


if __name__ == "__main__":
    main()
