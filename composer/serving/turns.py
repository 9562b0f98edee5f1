"""Engines that take turns on a GPU too small for all of them: one is awake, the others' weights wait in RAM.

vLLM calls it sleep mode: asleep, an engine keeps its weights in RAM and gives its GPU memory back.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

PATIENCE = 5.0
"""Seconds that requests for another engine wait while the one that is awake still takes new ones. Waking one costs
about a second, so turns that are too short would be spent on changing over."""

Switch = Callable[[str, bool], Awaitable[None]]
"""Wakes an engine (True) or puts it to sleep."""


@dataclass
class _Group:
    """Engines that share GPUs."""

    awake: str | None = None
    using: int = 0
    """Requests that the engine that is awake is answering."""
    waiting: dict[int, tuple[str, float]] = field(default_factory=dict)
    """By ticket: the engine that is waited for, and since when."""
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    def may_enter(self, ticket: int, engine: str) -> bool:
        """Return whether the request with a ticket may go on now."""
        others = [(one, since) for one, (name, since) in self.waiting.items() if name != self.awake]
        if engine == self.awake:
            # Who came before those that have waited too long for another engine may still go in.
            return not any(one < ticket and time.monotonic() - since > PATIENCE for one, since in others)
        return self.using == 0 and ticket == min(one for one, _ in others)


class Turns:
    """Wakes engines when they are asked, and sends the others to sleep."""

    def __init__(self, groups: Sequence[Sequence[str]], switch: Switch) -> None:
        """Prepare.

        Args:
            groups: Engines that share GPUs and do not fit there together; all asleep.
            switch: Wakes one, or puts one to sleep.
        """
        own = [(_Group(), names) for names in groups]
        self._groups = {name: group for group, names in own for name in names}
        self._switch = switch
        self._tickets = itertools.count()

    @asynccontextmanager
    async def turn(self, engine: str) -> AsyncIterator[None]:
        """Wait until an engine is awake, and keep it so.

        Raises:
            DownError: whatever `switch` raises; nobody is awake then.
        """
        group = self._groups.get(engine)
        if group is None:
            yield
            return
        ticket = next(self._tickets)
        async with group.changed:
            group.waiting[ticket] = (engine, time.monotonic())
            try:
                await group.changed.wait_for(lambda: group.may_enter(ticket, engine))
                if group.awake != engine:
                    asleep, group.awake = group.awake, None
                    if asleep is not None:
                        await self._switch(asleep, False)
                    await self._switch(engine, True)
                    group.awake = engine
                group.using += 1
            finally:
                del group.waiting[ticket]
                group.changed.notify_all()
        try:
            yield
        finally:
            async with group.changed:
                group.using -= 1
                group.changed.notify_all()

    @asynccontextmanager
    async def alone(self, engine: str) -> AsyncIterator[None]:
        """Send the others to sleep while an engine starts; requests wait. It is awake afterwards."""
        group = self._groups[engine]
        async with group.changed:
            await group.changed.wait_for(lambda: group.using == 0)
            awake, group.awake = group.awake, None
            if awake is not None and awake != engine:
                await self._switch(awake, False)
            yield
            group.awake = engine
            group.changed.notify_all()
