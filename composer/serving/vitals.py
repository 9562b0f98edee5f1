"""What a served composite takes: time to the first token, speed, memory; asked as a client would."""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from statistics import median
from typing import Any

import httpx
import psutil

from composer.value import Value

TOKENS = 24
"""Of an answer that is timed."""
PROMPTS = ("Write a short letter to a friend.", "What is 15% of 80?", "Explain why the sky is blue.")
PATIENCE = 120.0
"""Seconds an answer may take."""


class Pace(Value):
    """How one expert answers one request at a time: medians of a few."""

    first_token_ms: float
    tokens_per_second: float
    """After the first."""


class Vitals(Value):
    """What a served composite takes on the machine it was evaluated on."""

    route_ms: float
    """To find the expert of a prompt, the way through the gateway included."""
    paces: dict[str, Pace]
    """By expert."""
    memory_mb: dict[str, float]
    """Resident memory of each engine's processes, by the engine's name."""


def take_vitals(
    url: str, headers: Mapping[str, str], experts: Sequence[str], engines: Mapping[str, int]
) -> Vitals | None:
    """Ask each expert for a few short answers, and measure; return None if one does not answer.

    Args:
        url: The endpoint's address, without "/v1".
        headers: What opens it.
        experts: Their ids.
        engines: Process ids, by the engine's name.
    """
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=PATIENCE, trust_env=False) as client:
            ways = [_timed_route(client, prompt) for prompt in (*PROMPTS, *PROMPTS)]
            paces = {name: _pace(client, name) for name in experts}
    except (httpx.HTTPError, ValueError):
        return None
    memory = {name: round(_resident(pid) / 1e6, 1) for name, pid in engines.items()}
    return Vitals(route_ms=round(1000 * median(ways), 2), paces=paces, memory_mb=memory)


def _timed_route(client: httpx.Client, prompt: str) -> float:
    began = time.perf_counter()
    client.post("/v1/route", json={"input": prompt}).raise_for_status()
    return time.perf_counter() - began


def _pace(client: httpx.Client, expert: str) -> Pace:
    firsts, speeds = [], []
    for prompt in PROMPTS:
        body: dict[str, Any] = {"model": expert, "prompt": prompt, "max_tokens": TOKENS, "stream": True}
        began, times = time.perf_counter(), []
        with client.stream("POST", "/v1/completions", json={**body, "temperature": 0}) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    times.append(time.perf_counter())
        if not times:
            raise ValueError(f"{expert} gave no tokens")
        firsts.append(times[0] - began)
        if len(times) > 1:
            speeds.append((len(times) - 1) / max(times[-1] - times[0], 1e-9))
    speed = median(speeds) if speeds else 0.0
    return Pace(first_token_ms=round(1000 * median(firsts), 1), tokens_per_second=round(speed, 1))


def _resident(pid: int) -> int:
    """Return the resident memory of a process and all that it started, in bytes."""
    total = 0
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                total += int(one.memory_info().rss)
    return total
