"""Several experts in one vLLM engine against one engine for each: memory, throughput, start, equality of answers.

    python benchmarks/colocated.py MODEL MODEL [...] [--experts 2 4] [--requests 32] [--tokens 64] [--repeats 5]

The models must be fine-tunes of one base. For each number of experts, the same requests go to the experts in turn, all
at once, to separate engines and to a shared one; each engine has one thread and a key-value cache of its own of
`--kv-mb`. Memory is proportional set size (Linux) after the load; a start counts from nothing to the last engine's
first answer, as many starting at once as there are cores. Prints one JSON object for each way, medians over repeats.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from composer.artefacts import Store
from composer.serving import colocated
from composer.serving.engines import ENGINES, EngineSettings
from composer.serving.supervisor import free_port
from composer.zoo import Checkpoint, inspect_checkpoint

GUARD = Path(__file__).resolve().parent.parent / "composer" / "serving" / "guard.py"
OPENINGS = (
    "Once upon a time there was a little",
    "The answer to the question is",
    "def add(a, b):",
    "In the news today,",
)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--experts", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kv-mb", type=int, default=256)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        store = Store(Path(directory))
        checkpoints = [inspect_checkpoint(path.name, path, store) for path in options.models]
        for count in options.experts:
            chosen = checkpoints[:count]
            if len(chosen) < count:
                parser.error(f"{count} experts need as many models; {len(chosen)} are given")
            reason = colocated.obstacle(chosen, "float32")
            if reason is not None:
                parser.error(reason)
            answers = {}
            for way in ("separate", "shared"):
                report, answers[way] = measure(chosen, way, options)
                print(json.dumps({"experts": count, "engines": way, **report}), flush=True)
            equal = sum(one == other for one, other in zip(answers["separate"], answers["shared"], strict=True))
            print(json.dumps({"experts": count, "equal answers": equal, "of": len(answers["shared"])}), flush=True)


def measure(experts: list[Checkpoint], way: str, options: argparse.Namespace) -> tuple[dict[str, Any], list[Any]]:
    """Return figures of one way of serving experts, and the tokens of all answers."""
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        if way == "shared":
            urls = [wait(*stack.enter_context(engine(experts, options.kv_mb)))] * len(experts)
        else:
            urls = []
            together = os.cpu_count() or 1
            for start in range(0, len(experts), together):
                group = [stack.enter_context(engine([one], options.kv_mb)) for one in experts[start : start + together]]
                urls += [wait(*one) for one in group]
        started = time.monotonic() - began
        bodies = [body(place, experts, way, options.tokens) for place in range(options.requests)]
        targets = [urls[place % len(experts)] for place in range(options.requests)]
        asyncio.run(load(targets, bodies))  # the first time is slower
        figures = []
        for _ in range(options.repeats):
            cpu, began = cpu_seconds(), time.monotonic()
            answers = asyncio.run(load(targets, bodies))
            figures.append((time.monotonic() - began, cpu_seconds() - cpu))
        memory = sum(one.memory_full_info().pss for one in engines())
    seconds, cpu = (statistics.median(column) for column in zip(*figures, strict=True))
    return {
        "start_s": round(started, 1),
        "memory_mb": round(memory / 1e6),
        "tokens_per_s": round(options.requests * options.tokens / seconds),
        "seconds": round(seconds, 2),
        "spread_s": [round(min(one for one, _ in figures), 2), round(max(one for one, _ in figures), 2)],
        "cpu_s": round(cpu, 2),
    }, answers


@contextlib.contextmanager
def engine(experts: list[Checkpoint], kv_mb: int) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    """Start an engine and give its guard and its address; it takes a while to answer."""
    kind = ENGINES.get("vllm")
    limit = min(512, *(one.context_length or 512 for one in experts))
    settings = EngineSettings(
        port=free_port(), max_model_len=limit, dtype="float32", kv_cache_mb=kv_mb, threads=1, share=0.9
    )
    command = kind.command(experts[0].renamed("model"), settings)
    environment = {**os.environ, **kind.environment(settings)}
    if len(experts) > 1:
        command += colocated.arguments(experts)
        environment |= colocated.environment()
    process = subprocess.Popen(
        [sys.executable, "-S", str(GUARD), *command],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment,
    )  # fmt: skip
    try:
        yield process, f"http://127.0.0.1:{settings.port}"
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


def wait(process: "subprocess.Popen[bytes]", url: str) -> str:
    """Wait until an engine is ready; return its address."""
    while process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health").status_code == 200:
                return url
        time.sleep(0.1)
    sys.exit("an engine died at start")


def body(place: int, experts: list[Checkpoint], way: str, tokens: int) -> dict[str, Any]:
    """Return one request; all have prompts of their own."""
    extra = colocated.request(place % len(experts)) if way == "shared" else {}
    prompt = f"{OPENINGS[place % len(OPENINGS)]} {place} " * (1 + place % 7)
    wish = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return {"model": "model", "prompt": prompt, **wish, **extra}


async def load(urls: list[str], bodies: list[dict[str, Any]]) -> list[Any]:
    """Send all requests at once; return the tokens of the answers."""
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        answers = await asyncio.gather(
            *(client.post(f"{url}/v1/completions", json=one) for url, one in zip(urls, bodies, strict=True))
        )
    return [answer.raise_for_status().json()["choices"][0]["token_ids"] for answer in answers]


def engines() -> list[psutil.Process]:
    """Return all processes of all engines."""
    return psutil.Process().children(recursive=True)


def cpu_seconds() -> float:
    """Return what all engines have computed so far."""
    return sum(one.cpu_times().user + one.cpu_times().system for one in engines())


if __name__ == "__main__":
    main()
