"""One conversation, as doors hold it: messages in, words and progress out; it survives a restart."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from composer.chat.calls import Call, Question
from composer.chat.draft import Draft, begun
from composer.progress import Step
from composer.runs import runs_root
from composer.value import Value
from graphs.chat import ChatContext, build, cancel, served, serving_in_words, stop_serving

if TYPE_CHECKING:
    from composer.serving.server import Endpoint

FILE = "conversations.sqlite"
"""LangGraph's checkpoints of all conversations, in the runs directory; one thread for each."""


class Told(Value):
    """Something a conversation gives: words, a sign of progress, or what it waits for."""

    kind: Literal["say", "step", "ask"]
    text: str = ""
    code: int = 0
    """The exit code of the error that the words are about, or 0."""
    step: Step | None = None


class Standing(Value):
    """Where a conversation stands."""

    messages: tuple[dict[str, str], ...] = ()
    """All that was said: role ("you" or "composer") and text."""
    draft: Draft
    waiting: str | None = None
    """What it waits for an answer to, in words."""
    waits_for: Literal["answer", "download", "plan"] | None = None
    """Whether that is a question, or a yes to downloads or to the plan."""
    options: tuple[str, ...] = ()
    """What may be answered to the question, if it is one of several things."""
    broken_off: bool = False
    """Whether it ended in the middle of work, by a kill or a crash."""
    run: str | None = None
    """The run directory of the plan that waits, or was carried out last."""
    finished: tuple[str, ...] = ()
    """Runs that it finished, the last one last."""


WAITS: dict[str, Literal["answer", "download", "plan"]] = {"clarify": "answer", "fetch": "download", "approve": "plan"}
"""What the nodes of the chat graph wait for that wait for a person."""


class Conversation:
    """A conversation with the composer."""

    def __init__(
        self,
        name: str,
        *,
        root: Path | None = None,
        zoo: Path | None = None,
        home: Path | None = None,
        yes: bool = False,
        front: str = "",
    ) -> None:
        """Open a conversation, new or kept.

        Args:
            name: Its name.
            root: Where runs live.
            zoo: A recipe or a folder of checkpoints; by default the quickstart recipe.
            home: Where recipes are saved; by default the working directory.
            yes: Whether plans are approved without asking.
            front: Base address of the front that composites are served behind, if there is one.

        Raises:
            RecipeError: if there is no such zoo.
        """
        self.name, self.root = name, root or runs_root()
        self.context = ChatContext(root=str(self.root), zoo=str(zoo or ""), home=str(home or ""), yes=yes, front=front)
        self.context.desk  # noqa: B018 - what is wrong with the zoo is told now
        self.root.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def _graph(self) -> Iterator[Any]:
        from langgraph.checkpoint.sqlite import SqliteSaver

        os.environ.setdefault("LANGGRAPH_STRICT_MSGPACK", "true")
        with SqliteSaver.from_conn_string(str(self.root / FILE)) as saver:
            yield build().compile(checkpointer=saver)

    @property
    def _config(self) -> Any:
        return {"configurable": {"thread_id": self.name}}

    @property
    def state(self) -> dict[str, Any]:
        """What it remembers."""
        with self._graph() as graph:
            return dict(graph.get_state(self._config).values)

    @property
    def waiting(self) -> str | None:
        """What it waits for an answer to, or None."""
        with self._graph() as graph:
            interrupts = graph.get_state(self._config).interrupts
            return str(interrupts[0].value["ask"]) if interrupts else None

    @property
    def broken_off(self) -> bool:
        """Whether it ended in the middle of work, by a kill or a crash."""
        with self._graph() as graph:
            state = graph.get_state(self._config)
            return bool(state.next) and not state.interrupts

    @property
    def standing(self) -> Standing:
        """Where it stands, all read at once."""
        with self._graph() as graph:
            state = graph.get_state(self._config)
        kept, asked = state.values, state.values.get("question")
        question = Question.model_validate(asked) if asked and state.interrupts else None
        return Standing(
            messages=tuple(kept.get("messages") or ()),
            draft=Draft.model_validate(kept["draft"]) if kept.get("draft") else begun(self.context.desk.shelf),
            waiting=str(state.interrupts[0].value["ask"]) if state.interrupts else None,
            waits_for=WAITS[state.next[0]] if state.interrupts else None,
            options=question.options if question else (),
            broken_off=bool(state.next) and not state.interrupts,
            run=kept.get("run"),
            finished=tuple(kept.get("finished") or ()),
        )

    def say(self, message: str) -> Iterator[Told]:
        """Say something; yield what comes back, until it is done or waits for an answer."""
        from langgraph.types import Command

        yield from self._go(Command(resume=message) if self.waiting else {"said": message})

    def call(self, tool: Call) -> Iterator[Told]:
        """Call a tool as a driver would; what waits for an answer no longer does."""
        yield from self._go({"said": "", "question": None, "calls": [tool.model_dump(mode="json")]})

    def _go(self, start: Any) -> Iterator[Told]:
        with self._graph() as graph:
            for told in graph.stream(
                start, self._config, context=self.context, stream_mode="custom", durability="sync"
            ):
                if "say" in told:
                    yield Told(kind="say", text=told["say"], code=told.get("code", 0))
                else:
                    yield Told(kind="step", step=Step.model_validate(told["step"]))
            interrupts = graph.get_state(self._config).interrupts
            if interrupts:
                yield Told(kind="ask", text=str(interrupts[0].value["ask"]))

    def forget(self) -> None:
        """Begin again under the same name; runs are kept."""
        from langgraph.checkpoint.sqlite import SqliteSaver

        with SqliteSaver.from_conn_string(str(self.root / FILE)) as saver:
            saver.delete_thread(self.name)

    def cancel(self) -> bool:
        """Stop the run that is going on in this process; the conversation goes on."""
        return cancel()

    @property
    def serving(self) -> str | None:
        """What this process serves, and where, or None."""
        return serving_in_words()

    @property
    def endpoint(self) -> "Endpoint | None":
        """Where this process serves a composite, or None."""
        return served()

    def close(self) -> None:
        """Stop what this process serves."""
        stop_serving()
