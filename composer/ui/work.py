"""What is done in a conversation, one thing at a time, in a thread of the server; browsers come and go."""

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from composer.chat.calls import Call
from composer.chat.words import LONGEST
from composer.errors import RecipeError
from composer.progress import Step
from composer.runs import Run
from graphs.background import Background
from graphs.conversation import Conversation, Standing, Told

if TYPE_CHECKING:
    from composer.serving.server import Endpoint

PATIENCE = 15.0
"""Seconds that work may take to stop when the server does."""


class Work:
    """A conversation and the thread that works on it; it outlives every browser."""

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self.standing: Standing = conversation.standing
        self.endpoint: Endpoint | None = None
        """Where the composite answers, if it is served here."""
        self.wrong: set[str] = set()
        """Which of the last answers are about something that went wrong."""
        self.elsewhere: str | None = None
        """What another process works on: one run has the machine."""
        self._background = Background(conversation, self._read)
        self._heard: list[dict[str, str]] | None = None
        """What was said to it since `standing` was read, while that is being answered."""
        self._reads = 0
        self._lock = threading.Lock()
        self._seen = self._stamp()

    @property
    def busy(self) -> bool:
        """Whether something is being done."""
        return self._background.running

    @property
    def error(self) -> str:
        """What went wrong outside of the conversation, in one line."""
        return self._background.error

    @property
    def steps(self) -> tuple[Step, ...]:
        """The last few signs of life of what is being done, or was done last."""
        return tuple(self._background.steps)

    @property
    def step(self) -> Step | None:
        """The last sign of life of what is being done."""
        steps = self.steps
        return steps[-1] if self.busy and steps else None

    @property
    def version(self) -> tuple[int, int, int, bool]:
        """Another one whenever something is new."""
        return self._reads, self._background.signs, len(self._background.told), self.busy

    @property
    def said(self) -> list[dict[str, str]]:
        """What has been said since `standing` was read."""
        if self._heard is None:
            return []
        words = (one for one in tuple(self._background.told) if one.kind == "say")
        return [*self._heard, *({"role": "composer", "text": one.text, "code": str(one.code)} for one in words)]

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
        self._start(self.conversation.say(message), [{"role": "you", "text": message}])

    def call(self, tool: Call) -> None:
        """Call a tool of the conversation; returns at once.

        Raises:
            BusyError: if something is being done.
        """
        self._start(self.conversation.call(tool), [])

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

    def close(self) -> None:
        """Stop what is being done, and what is served."""
        if self.busy:
            self.stop()
            self._background.wait(PATIENCE)
        self.conversation.close()

    def _start(self, work: Iterator[Told], heard: list[dict[str, str]]) -> None:
        with self._lock:
            if not self.busy:
                self._heard, self.endpoint = heard, None
            self._background.start(work)

    def _read(self) -> None:
        """Read where the conversation stands; called by its thread when it has ended, and by `look`."""
        self.wrong |= {one["text"] for one in self.said if one.get("code", "0") != "0"}
        self.endpoint, self.standing = self.conversation.endpoint, self.conversation.standing
        self._heard = None
        self._seen = self._stamp()  # reading changes SQLite's files too
        self._reads += 1

    def _stamp(self) -> tuple[int, ...]:
        """Return what changes when any process writes the conversations."""
        files = sorted(self.conversation.root.glob("conversations.sqlite*"))
        return tuple(file.stat().st_mtime_ns for file in files if file.name.endswith(("sqlite", "-wal")))
