"""Half an hour of mixed traffic while engines are killed: nothing wrong, nothing hung, nothing leaked.

    python benchmarks/soak.py [--minutes 30] [--kill-every 120] [--clients 4] [--pause 0.2]

Two quickstart models are served by real engines behind the gateway, in a process of its own. Clients ask by name and by
prompt, chat and complete, stream and not, go away in the middle, and send nonsense. Answers are greedy, so each must be
what its expert said before the storm, or end with an error that has a proper status. One line a minute.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from composer.artefacts import Store
from composer.cli import _quiet_libraries
from composer.mixture import Expert, Known, build_composite
from composer.mixture.settings import MixtureSection, RouterSection
from composer.serving.server import Server
from composer.serving.settings import ServeSection
from composer.zoo import inspect_checkpoint

MODELS = Path(__file__).resolve().parent.parent / "recipes" / "quickstart" / "models"
EXAMPLES = {
    "stories-math": ("What is 12 plus 30?", "A box holds 3 rows of 4 eggs. How many?", "How much is 15% of 80?"),
    "script-code": ("def add(a, b):", "for i in range(10):", "class Dog:\n    def bark(self):"),
}
NOBODY = Known(*(lambda *_: sys.exit("not needed") for _ in range(3)))
PATIENCE = 90.0
"""Seconds after which a request counts as hung."""


def serve() -> None:
    """Serve until standard input closes."""
    with tempfile.TemporaryDirectory() as home:
        store = Store(Path(home) / "store")
        experts = tuple(
            Expert(id=n, checkpoint=inspect_checkpoint(n, MODELS / n, store), members=(n,), examples=t, reason="")
            for n, t in EXAMPLES.items()
        )
        section = MixtureSection(router=RouterSection(abstain_to="stories-math"))
        directory = build_composite("mix", experts, {}, section, store, NOBODY)
        with Server(directory, ServeSection(port=0, kv_cache_mb=64), Path(home) / "logs") as server:
            print(server.endpoint.url, flush=True)
            sys.stdin.read()


class Storm:
    """The traffic, and what came of it."""

    def __init__(self, url: str, pause: float) -> None:
        self.url, self.pause = url, pause
        self.prompts = [text for texts in EXAMPLES.values() for text in texts]
        self.expected: dict[tuple[str, str, bool], str] = {}
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.dice = random.Random(0)  # noqa: S311

    async def learn(self, session: aiohttp.ClientSession) -> None:
        """Ask every expert every question once."""
        for expert in EXAMPLES:
            for prompt in self.prompts:
                for chat in (False, True):
                    text, _, _ = await self.ask(session, expert, prompt, chat=chat, stream=False)
                    self.expected[expert, prompt, chat] = text

    async def ask(
        self, session: aiohttp.ClientSession, model: str, prompt: str, *, chat: bool, stream: bool, most: int = 10**9
    ) -> tuple[str, int, Any]:
        """Ask once; return the text, the status and the headers; "!" in front of what ended with an error event."""
        body: dict[str, Any] = {"model": model, "max_tokens": 24, "temperature": 0, "stream": stream}
        body |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        path = "chat/completions" if chat else "completions"
        async with session.post(f"{self.url}/v1/{path}", json=body) as answer:
            if answer.status != 200:
                return (await answer.json())["error"]["message"], answer.status, answer.headers
            if not stream:
                choice = (await answer.json())["choices"][0]
                return choice["message"]["content"] if chat else choice["text"], 200, answer.headers
            text, seen = "", 0
            async for line in answer.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    return "!" + event["error"]["message"], 200, answer.headers
                for choice in event["choices"]:
                    text += (choice["delta"].get("content") or "") if chat else choice["text"]
                seen += 1
                if seen >= most:
                    return "...", 200, answer.headers
            return text, 200, answer.headers

    async def client(self, session: aiohttp.ClientSession, end: float) -> None:
        """Ask until the end."""
        while time.monotonic() < end:
            await asyncio.sleep(self.dice.random() * 2 * self.pause)
            kind = self.dice.choices(["answer", "leave", "nonsense"], [8, 1, 1])[0]
            try:
                async with asyncio.timeout(PATIENCE):
                    await {"answer": self.answer, "leave": self.leave, "nonsense": self.nonsense}[kind](session)
            except TimeoutError:
                self.counts["hung"] += 1
                self.wrong.append(f"{kind}: no answer within {PATIENCE} s")
            except (aiohttp.ClientError, ValueError, KeyError) as error:
                self.counts["broken"] += 1
                self.wrong.append(f"{kind}: {type(error).__name__} {error}")

    async def answer(self, session: aiohttp.ClientSession) -> None:
        """Ask something that has an answer."""
        prompt, chat, stream = self.dice.choice(self.prompts), self.dice.random() < 0.5, self.dice.random() < 0.5
        model = self.dice.choice(["mix", "mix", *EXAMPLES])
        text, status, headers = await self.ask(session, model, prompt, chat=chat, stream=stream)
        if status == 503 and int(headers["retry-after"]) > 0:
            self.counts["503"] += 1
        elif status != 200:
            self.wrong.append(f"{model}: {status} {text}")
        elif text.startswith("!"):
            self.counts["error event"] += 1
        elif text == self.expected[headers["x-composer-expert"], prompt, chat]:
            self.counts["right"] += 1
            self.counts["by another"] += "x-composer-instead-of" in headers
        else:
            self.wrong.append(f"{model} {prompt!r}: {text!r}")

    async def leave(self, session: aiohttp.ClientSession) -> None:
        """Go away in the middle of an answer."""
        await self.ask(session, "mix", self.dice.choice(self.prompts), chat=False, stream=True, most=2)
        self.counts["left"] += 1

    async def nonsense(self, session: aiohttp.ClientSession) -> None:
        """Ask what cannot be answered."""
        content, right = self.dice.choice([(b"{", 400), (b'{"model": "nobody", "prompt": "a"}', 404),
                                           (b'{"model": "mix", "prompt": 3}', 400)])  # fmt: skip
        async with session.post(f"{self.url}/v1/completions", data=content) as answer:
            if answer.status != right or "error" not in await answer.json():
                self.wrong.append(f"{content!r}: {answer.status}")
            self.counts["refused"] += 1


def kill_one(process: psutil.Process, dice: random.Random) -> str | None:
    """Kill one engine; return what was killed."""
    engines = [
        one for one in process.children(recursive=True) if "--port" in one.cmdline() and "-S" not in one.cmdline()
    ]
    if not engines:
        return None
    victim = dice.choice(engines)
    name = f"port {victim.cmdline()[victim.cmdline().index('--port') + 1]}"
    victim.kill()
    return name


async def rage(storm: Storm, server: psutil.Process, options: argparse.Namespace) -> list[float]:
    """Let the storm rage; return the gateway's memory in MB, minute by minute."""
    memory, dice = [], random.Random(1)  # noqa: S311
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        await storm.learn(session)
        end = time.monotonic() + 60 * options.minutes
        clients = [asyncio.ensure_future(storm.client(session, end)) for _ in range(options.clients)]
        began = next_kill = next_line = time.monotonic()
        next_kill += options.kill_every
        while not all(one.done() for one in clients):
            await asyncio.sleep(0.5)
            now = time.monotonic()
            if now >= next_kill and now < end - 30:
                next_kill += options.kill_every
                storm.counts["killed"] += kill_one(server, dice) is not None
            if now >= next_line:
                next_line += 60
                memory.append(server.memory_info().rss / 1e6)
                print(json.dumps({"minute": round((now - began) / 60), "gateway_mb": round(memory[-1], 1),
                                  "wrong": len(storm.wrong), **storm.counts}), flush=True)  # fmt: skip
        await asyncio.gather(*clients)
    return memory


def main() -> None:
    """Storm."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--kill-every", type=float, default=120)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--pause", type=float, default=0.2, help="mean seconds between a client's requests")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    _quiet_libraries()
    if options.serve:
        serve()
        return
    command = [sys.executable, __file__, "--serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        storm = Storm(process.stdout.readline().strip(), options.pause)
        server = psutil.Process(process.pid)
        memory = asyncio.run(rage(storm, server, options))
        children = server.children(recursive=True)
        process.stdin.close()
        process.wait(60)
    left = list(psutil.wait_procs(children, 20)[1])
    later = memory[len(memory) // 3 :]
    print(json.dumps({"wrong": storm.wrong[:20], "counts": storm.counts, "left_behind": len(left),
                      "gateway_mb_first_third_to_end": [round(later[0], 1), round(later[-1], 1)]}))  # fmt: skip
    sys.exit(bool(storm.wrong or left or storm.counts["hung"]))


if __name__ == "__main__":
    main()
