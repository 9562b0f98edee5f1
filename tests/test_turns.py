"""Engines that take turns: one awake at a time, nobody cut off, nobody starved."""

import asyncio

import pytest

from composer.serving import turns
from composer.serving.turns import Turns


class Engines:
    """What happens to some engines."""

    def __init__(self) -> None:
        self.awake: set[str] = set()
        self.switches: list[str] = []
        self.broken: set[str] = set()

    async def switch(self, engine: str, awake: bool) -> None:
        await asyncio.sleep(0.01)
        if engine in self.broken:
            raise ConnectionError(engine)
        self.switches.append(f"{'wake' if awake else 'sleep'} {engine}")
        (self.awake.add if awake else self.awake.discard)(engine)


async def ask(one: Turns, engines: Engines, name: str, seconds: float = 0.05) -> None:
    async with one.turn(name):
        for _ in range(5):
            assert engines.awake & {"a", "b", "c"} == {name}
            await asyncio.sleep(seconds / 5)


def test_one_is_awake_at_a_time_and_requests_for_it_go_together() -> None:
    async def play() -> None:
        engines = Engines()
        own = Turns([("a", "b", "c")], engines.switch)
        await asyncio.gather(*(ask(own, engines, name) for name in "aabaabca"))
        assert engines.switches[0] == "wake a"
        assert engines.switches.count("wake a") == 1, "those who came later went in with the others"
        assert sorted(s for s in engines.switches if s.startswith("wake")) == ["wake a", "wake b", "wake c"]

    asyncio.run(play())


def test_who_has_waited_long_enough_comes_before_newcomers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "PATIENCE", 0.2)

    async def play() -> None:
        engines = Engines()
        own = Turns([("a", "b")], engines.switch)
        stop = asyncio.Event()

        async def flood() -> None:
            while not stop.is_set():
                await ask(own, engines, "a", 0.05)

        floods = [asyncio.ensure_future(flood()) for _ in range(4)]
        await asyncio.sleep(0.1)
        await asyncio.wait_for(ask(own, engines, "b"), 3)
        stop.set()
        await asyncio.gather(*floods)

    asyncio.run(play())


def test_an_engine_that_does_not_wake_blocks_nobody() -> None:
    async def play() -> None:
        engines = Engines()
        own = Turns([("a", "b")], engines.switch)
        await ask(own, engines, "a")
        engines.broken.add("b")
        with pytest.raises(ConnectionError):
            await ask(own, engines, "b")
        await asyncio.wait_for(ask(own, engines, "a"), 3)
        assert engines.switches == ["wake a", "sleep a", "wake a"]

    asyncio.run(play())


def test_a_request_that_is_given_up_while_it_waits_leaves_no_trace() -> None:
    async def play() -> None:
        engines = Engines()
        own = Turns([("a", "b")], engines.switch)
        first = asyncio.ensure_future(ask(own, engines, "a", 0.3))
        await asyncio.sleep(0.05)
        waiting = asyncio.ensure_future(ask(own, engines, "b"))
        await asyncio.sleep(0.05)
        waiting.cancel()
        await first
        await asyncio.wait_for(ask(own, engines, "a"), 3)
        assert engines.switches == ["wake a"]

    asyncio.run(play())


def test_engines_that_have_their_gpu_to_themselves_take_no_turns() -> None:
    async def play() -> None:
        engines = Engines()
        engines.awake = {"c"}
        await ask(Turns([("a", "b")], engines.switch), engines, "c")
        assert engines.switches == []

    asyncio.run(play())
