"""A conversation whose work goes on whether or not somebody waits for it."""

import threading
from collections import deque
from collections.abc import Callable, Iterator

from composer.errors import BusyError, ComposerError
from composer.progress import Step
from graphs.conversation import Conversation, Told

LOG = 8
"""Signs of progress that are remembered."""


class Background:
    """Does a conversation's work in a thread of its own, one piece at a time."""

    def __init__(self, conversation: Conversation, ended: Callable[[], None] = lambda: None) -> None:
        """Take the conversation.

        Args:
            conversation: Whose work is done.
            ended: Called in the work's thread when it has ended, before it counts as ended.
        """
        self.conversation = conversation
        self.told: list[Told] = []
        """What the work that goes on, or went on last, has given so far: words, and where stages begin."""
        self.steps: deque[Step] = deque(maxlen=LOG)
        """Its last signs of progress."""
        self.signs = 0
        """How many of them there were, ever."""
        self.error = ""
        """What went wrong outside of the conversation, in one line."""
        self.running = False
        """Whether work is going on."""
        self._ended = ended
        self._news = threading.Condition()
        self._job: threading.Thread | None = None

    @property
    def doing(self) -> str:
        """What the work is at, in words."""
        steps = tuple(self.steps)
        return f"{steps[-1].stage}: {steps[-1].message}" if steps else "work"

    @property
    def words(self) -> str:
        """What has been said, without signs of progress."""
        return "\n".join(one.text for one in self.told if one.step is None)

    def start(self, work: Iterator[Told]) -> None:
        """Begin some work.

        Raises:
            BusyError: if work is going on.
        """
        with self._news:
            if self.running:
                raise BusyError(f"one thing at a time: {self.doing} is going on; wait until it is done, or stop it")
            self.told, self.error, self.running = [], "", True
            self.steps.clear()
        self._job = threading.Thread(target=self._do, args=(work,), daemon=True, name="conversation")
        self._job.start()

    def news(self, seen: int, seconds: float) -> list[Told]:
        """Return what has been told after the first `seen` things; wait for it, or the end, for some seconds."""
        with self._news:
            self._news.wait_for(lambda: len(self.told) > seen or not self.running, timeout=seconds)
            return self.told[seen:]

    def wait(self, seconds: float) -> bool:
        """Wait for the end of the work; return whether it has come."""
        if self._job is not None:
            self._job.join(seconds)
        return not self.running

    def _do(self, work: Iterator[Told]) -> None:
        try:
            for one in work:
                self._tell(one)
        except Exception as error:  # said to whoever asks next; the process goes on
            kind = "" if isinstance(error, ComposerError) else f"{type(error).__name__}: "
            self.error = f"{kind}{error}"
            self._tell(Told(kind="say", text=self.error, code=getattr(error, "exit_code", 1)))
        finally:
            try:
                self._ended()
            finally:
                with self._news:
                    self.running = False
                    self._news.notify_all()

    def _tell(self, one: Told) -> None:
        with self._news:
            begins = one.step is None or not self.steps or self.steps[-1].stage != one.step.stage
            if one.step is not None:
                self.steps.append(one.step)
                self.signs += 1
            if begins:
                self.told.append(one)
                self._news.notify_all()
