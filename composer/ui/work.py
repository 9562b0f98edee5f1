"""What is done in a conversation, one thing at a time, in a thread of the server; browsers come and go."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from composer.chat.calls import Call
from composer.chat.words import LONGEST
from composer.errors import BusyError, ComposerError, RecipeError
from composer.progress import Step
from composer.runs import Run

if TYPE_CHECKING:
    from composer.serving.server import Endpoint
    from graphs.conversation import Conversation, Standing, Told

LOG = 8
"""Signs of life that are remembered."""
PATIENCE = 15.0
"""Seconds that work may take to stop when the server does."""


class Work:
    """A conversation and the thread that works on it; it outlives every browser."""

    def __init__(self, conversation: "Conversation") -> None:
        self.conversation = conversation
        self.standing: Standing = conversation.standing
        self.endpoint: Endpoint | None = None
        """Where the composite answers, if it is served here."""
        self.said: list[dict[str, str]] = []
        """What has been said since `standing` was read."""
        self.step: Step | None = None
        """The last sign of life."""
        self.steps: deque[Step] = deque(maxlen=LOG)
        """The last few of them."""
        self.error = ""
        """What went wrong outside of the conversation, in one line."""
        self.wrong: set[str] = set()
        """Which of the last answers are about something that went wrong."""
        self.elsewhere: str | None = None
        """What another process works on: one run has the machine."""
        self.busy = False
        """Whether something is being done."""
        self.version = 0
        """Grows whenever something is new."""
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._seen = self._stamp()

    @property
    def messages(self) -> list[dict[str, str]]:
        """All that was said, the last message last."""
        return [*self.standing.messages, *self.said]

    @property
    def run(self) -> Run | None:
        """The run that is worked on; else the one that was planned or carried out last."""
        live = self.conversation.context.desk.run
        if live is not None:
            return live
        return Run(self.conversation.root / self.standing.run) if self.standing.run else None

    @property
    def running(self) -> bool:
        """Whether the run is worked on, here or by another process."""
        if self.busy:
            return self.conversation.context.desk.run is not None
        return self.run is not None and self.elsewhere is not None and self.elsewhere.endswith(self.run.name)

    def say(self, message: str) -> None:
        """Say something; returns at once.

        Raises:
            BusyError: if something is being done.
            RecipeError: if the message is longer than one can be.
        """
        if len(message) > LONGEST:
            raise RecipeError(f"a message of more than {LONGEST:,} characters is not read; say it shorter")
        self._start(lambda: self.conversation.say(message), [{"role": "you", "text": message}])

    def call(self, tool: Call) -> None:
        """Call a tool of the conversation; returns at once.

        Raises:
            BusyError: if something is being done.
        """
        self._start(lambda: self.conversation.call(tool), [])

    def stop(self) -> None:
        """Stop the run at its next step; it carries on from there when it is run again."""
        self.conversation.cancel()

    def look(self) -> None:
        """Take notice of what another process said in this conversation, in a terminal for one."""
        if self.busy:
            return
        desk = self.conversation.context.desk
        elsewhere = desk.working_on() if (desk.root / "working").is_file() else None
        if self._stamp() != self._seen or elsewhere != self.elsewhere:
            self.elsewhere = elsewhere
            self._read()
            self.version += 1

    def close(self) -> None:
        """Stop what is being done, and what is served."""
        if self.busy and self._thread is not None:
            self.stop()
            self._thread.join(PATIENCE)
        self.conversation.close()

    def _start(self, begin: "Callable[[], Iterator[Told]]", heard: list[dict[str, str]]) -> None:
        with self._lock:
            if self.busy:
                raise BusyError("one thing at a time: wait until it is done, or press Stop")
            self.said, self.step, self.error, self.endpoint = heard, None, "", None
            self.steps.clear()
            self.busy = True
            self._thread = threading.Thread(target=self._do, args=(begin,), daemon=True, name="conversation")
            self._thread.start()
            self.version += 1

    def _do(self, begin: "Callable[[], Iterator[Told]]") -> None:
        try:
            for told in begin():
                if told.step is not None:
                    self.step = told.step
                    self.steps.append(told.step)
                elif told.kind == "say":
                    self.said.append({"role": "composer", "text": told.text, "code": str(told.code)})
                self.version += 1
        except ComposerError as error:
            self.error = str(error)
        except Exception as error:  # shown on the page; the server goes on
            self.error = f"{type(error).__name__}: {error}"
        finally:
            self._read()
            self.busy = False
            self.version += 1

    def _read(self) -> None:
        self.wrong |= {one["text"] for one in self.said if one.get("code", "0") != "0"}
        self.endpoint, self.step = self.conversation.endpoint, None
        self.standing, self.said = self.conversation.standing, []
        self._seen = self._stamp()  # reading changes SQLite's files too

    def _stamp(self) -> tuple[int, ...]:
        """Return what changes when any process writes the conversations."""
        files = sorted(self.conversation.root.glob("conversations.sqlite*"))
        return tuple(file.stat().st_mtime_ns for file in files if file.name.endswith(("sqlite", "-wal")))
