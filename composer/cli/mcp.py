"""`mcp`: the tools of the chat, for programs."""

from importlib.util import find_spec
from pathlib import Path

import click

from composer.errors import RecipeError
from composer.runs import runs_root


@click.command("mcp")
@click.option("--zoo", type=click.Path(path_type=Path), help="A recipe, or a folder of checkpoints.")
@click.option("--name", default="mcp", show_default=True, help="The conversation to carry on.")
def command(zoo: Path | None, name: str) -> None:
    """Offer the tools of the chat to programs, over the Model Context Protocol on standard input and output.

    Nothing is made before 'answer' has been given a yes to the plan.
    """
    if find_spec("mcp") is None:
        raise RecipeError("this needs the package 'mcp': pip install 'model-composer[mcp]'")
    from graphs.conversation import Conversation
    from graphs.tool_server import serve

    conversation = Conversation(name, root=runs_root(), zoo=zoo)
    try:
        serve(conversation)
    finally:
        conversation.close()
