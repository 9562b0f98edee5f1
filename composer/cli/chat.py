"""`chat`: ask for a composite in plain words."""

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from composer.errors import INTERRUPTED, ComposerError, NotApprovedError, RecipeError
from composer.runs import runs_root

if TYPE_CHECKING:
    from composer.progress import Progress
    from graphs.conversation import Conversation, Told

LEAVING = {"exit", "quit", "bye", "leave", "q", ":q", "goodbye"}


@click.command("chat")
@click.argument("messages", nargs=-1, metavar="[MESSAGE]...")
@click.option("--zoo", type=click.Path(path_type=Path), help="A recipe, or a folder of checkpoints.")
@click.option("--name", help="The conversation to carry on; by default the zoo's.")
@click.option("--new", is_flag=True, help="Begin a new conversation of that name.")
@click.option("--yes", is_flag=True, help="Approve plans without asking; for scripts.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, for machines.")
def command(messages: tuple[str, ...], zoo: Path | None, name: str | None, new: bool, yes: bool, as_json: bool) -> None:
    """Ask for a composite in plain words; shows a plan, waits for a yes, runs it, and answers questions about it.

    Without MESSAGEs it reads them from the terminal, or one a line from standard input. What was said and made is
    kept: the same command carries on. Ctrl-C stops a run, not the conversation. 'help' says what can be asked for.
    """
    if yes and not messages and sys.stdin.isatty():
        raise click.UsageError("--yes is for scripts: give MESSAGEs or standard input; on a terminal, say yes yourself")
    from graphs.conversation import Conversation

    root = runs_root()
    chosen = name or (zoo.stem if zoo else "quickstart")
    conversation = Conversation(chosen, root=root, zoo=zoo, yes=yes)
    if new:
        conversation.forget()
    door = _Door(conversation, as_json=as_json)
    try:
        if messages or not sys.stdin.isatty():
            given = messages or (line.strip() for line in sys.stdin)
            raise click.exceptions.Exit(door.script(message for message in given if message))
        door.greet()
        door.talk(root / "chat_history")
    finally:
        conversation.close()


class _Door:
    """The terminal's side of a conversation."""

    def __init__(self, conversation: "Conversation", *, as_json: bool) -> None:
        self.conversation, self.as_json = conversation, as_json

    def greet(self) -> None:
        """Say where the conversation stands."""
        kept = self.conversation.state
        if not kept.get("messages"):
            shelf = self.conversation.context.desk.shelf
            click.echo(f"{len(shelf.models)} models from {shelf.path}. What shall they become? ('help', 'exit')")
            return
        click.echo(f"carrying on with '{self.conversation.name}' (--new begins again); last said:")
        for message in kept["messages"][-2:]:
            click.echo(f"  {message['role']}: {message['text']}")
        if self.conversation.broken_off:
            click.echo("it was broken off in the middle; say 'run' to carry on where the run stopped")
        waiting = self.conversation.waiting
        if waiting:
            click.echo(waiting)

    def talk(self, history: Path) -> None:
        """Read messages from the terminal until it is left."""
        with suppress(ImportError):
            import readline

            with suppress(OSError):
                readline.read_history_file(history)
            readline.set_history_length(1000)
        while True:
            try:
                message = input("> ").strip()
            except EOFError:
                click.echo()
                break
            except KeyboardInterrupt:
                click.echo("\n('exit' leaves)")
                continue
            with suppress(ImportError, OSError):
                readline.write_history_file(history)
            if message.lower() in LEAVING:
                break
            if message:
                self.exchange(message)
        serving = self.conversation.serving
        if serving:
            click.echo(f"{serving} stops with this conversation; 'model-composer serve' brings it up again")

    def script(self, messages: Iterator[str]) -> int:
        """Say one message after another; return the exit code of the last."""
        code = 0
        for message in messages:
            if message.lower() in LEAVING:
                break
            if not self.as_json:
                click.echo(f"> {message}")
            code = self.exchange(message)
        waiting = self.conversation.waiting
        if code == 0 and waiting:
            asked = bool(self.conversation.state.get("question"))
            code = (RecipeError if asked else NotApprovedError).exit_code
        return code

    def exchange(self, message: str) -> int:
        """Say one message and show what comes back; return an exit code."""
        code = 0
        try:
            with self._stoppable(), _Screen(as_json=self.as_json) as screen:
                for told in self.conversation.say(message):
                    code = max(code, told.code)
                    screen.show(told)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            return INTERRUPTED
        except ComposerError as error:
            click.echo(f"error: {error}", err=True)
            return error.exit_code
        return code

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Let the first Ctrl-C stop the run at its next step, and the second one stop at once."""
        pressed: list[int] = []

        def stop(number: int, frame: FrameType | None) -> None:
            if pressed or not self.conversation.cancel():
                raise KeyboardInterrupt
            pressed.append(number)
            click.echo("\nstopping the run …", err=True)

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


class _Screen:
    """Shows what a conversation gives: words on standard output, progress on standard error."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self._stack = ExitStack()
        self._draw: Progress | None = None
        self._last = ""

    def __enter__(self) -> "_Screen":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def show(self, told: "Told") -> None:
        """Show one thing."""
        if self.as_json:
            click.echo(json.dumps(told.model_dump(mode="json", exclude_defaults=True) | {"kind": told.kind}))
        elif told.step is not None:
            if self._draw is None:
                from composer.cli.progress import progress_bar

                self._draw = self._stack.enter_context(progress_bar())
            self._draw(told.step)
        else:
            self._stack.close()
            self._draw = None
            if told.text != self._last:  # a question that has just been said is not said again
                click.echo(told.text)
            self._last = told.text
