"""`ui`: the chat as a page in a browser, beside what it is about."""

from importlib.util import find_spec
from pathlib import Path

import click

from composer.errors import RecipeError
from composer.runs import runs_root


@click.command("ui")
@click.option("--zoo", type=click.Path(path_type=Path), help="A recipe, or a folder of checkpoints.")
@click.option("--name", help="The conversation to carry on; by default the zoo's, as for 'chat'.")
@click.option("--port", type=click.IntRange(0, 65535), default=7860, show_default=True, help="0 takes any free one.")
def command(zoo: Path | None, name: str | None, port: int) -> None:
    """Show the chat as a page in a browser, with the run, the plan, the zoo, the evidence and a playground beside it.

    It listens on this machine only. A run goes on when the browser is closed; Ctrl-C stops the run and what is served,
    and the same command carries on. Conversations are those of 'chat'.
    """
    if find_spec("nicegui") is None:
        raise RecipeError("this needs the package 'nicegui': pip install 'model-composer[ui]'")
    from composer.ui.server import serve
    from composer.ui.work import Work
    from graphs.conversation import Conversation

    conversation = Conversation(name or (zoo.stem if zoo else "quickstart"), root=runs_root(), zoo=zoo)
    work = Work(conversation)
    try:
        serve(work, port)
    finally:
        work.close()
