"""A conversation whose work goes on whether or not somebody waits for it."""

import threading
import time
from collections.abc import Iterator

from composer.errors import ComposerError
from graphs.conversation import Conversation, Told

PAUSE = 0.2
"""Seconds between signs of progress that are kept, where they are of one stage."""


class Background:
    """Does a conversation's work in a thread of its own, one piece at a time."""

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self.told: list[Told] = []
        """What the work that goes on, or went on last, has given so far."""
        self._news = threading.Condition()
        self._job: threading.Thread | None = None
        self.running = False
        """Whether work is going on."""

    @property
    def doing(self) -> str:
        """What the work is at, in words."""
        step = next((one.step for one in reversed(self.told) if one.step), None)
        return f"{step.stage}: {step.message}" if step else "work"

    @property
    def words(self) -> str:
        """What has been said, without signs of progress."""
        return "\n".join(one.text for one in self.told if one.step is None)

    def start(self, work: Iterator[Told]) -> None:
        """Begin some work; only when none is going on."""
        if self.running:
            raise RuntimeError(f"{self.doing} is going on")
        self.told, self.running = [], True
        self._job = threading.Thread(target=self._do, args=(work, self.told), daemon=True)
        self._job.start()

    def news(self, seen: int, seconds: float) -> list[Told]:
        """Return what has been given after the first `seen` things; wait for it, or the end, for some seconds."""
        with self._news:
            self._news.wait_for(lambda: len(self.told) > seen or not self.running, timeout=seconds)
            return self.told[seen:]

    def wait(self, seconds: float) -> bool:
        """Wait for the end of the work; return whether it has come."""
        if self._job is not None:
            self._job.join(seconds)
        return not self.running

    def _do(self, work: Iterator[Told], told: list[Told]) -> None:
        last, when = "", 0.0
        try:
            for one in work:
                if one.step is not None:
                    if one.step.stage == last and time.monotonic() - when < PAUSE:
                        continue
                    last, when = one.step.stage, time.monotonic()
                self._tell(told, one)
        except Exception as error:  # said to whoever asks next; the process goes on
            kind = "" if isinstance(error, ComposerError) else f"{type(error).__name__}: "
            self._tell(told, Told(kind="say", text=f"{kind}{error}", code=getattr(error, "exit_code", 1)))
        finally:
            with self._news:
                self.running = False
                self._news.notify_all()

    def _tell(self, told: list[Told], one: Told) -> None:
        with self._news:
            told.append(one)
            self._news.notify_all()
