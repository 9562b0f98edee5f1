"""`serve`: a composite behind its endpoint."""

import signal
import threading
from typing import TYPE_CHECKING

import click

from composer.cli.options import json_option, print_json
from composer.errors import RecipeError, ServeError
from composer.recipe import override
from composer.runs import Run, runs_root

if TYPE_CHECKING:
    from composer.serving.server import Server


@click.command("serve")
@click.argument("run")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@json_option
def command(run: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Serve the composite of a run until Ctrl-C. RUN is a path, a run's or a recipe's name.

    The recipe's serve settings can be overridden: model-composer serve quickstart port=9000
    """
    found = Run.find(run, runs_root())
    if not found.composite.exists():
        raise RecipeError(f"{found.name} has no composite yet; 'model-composer run' with its recipe makes it")
    settings = [one if one.startswith("serve.") else f"serve.{one}" for one in overrides]
    section = override(found.recipe, settings).serve
    from composer.cli.progress import progress_bar
    from composer.serving.server import Server

    with progress_bar(quiet=as_json) as progress:
        server = Server(found.composite.resolve(), section, found.logs, progress).__enter__()
    try:
        if as_json:
            print_json(server.endpoint.model_dump(mode="json"))
        serve_until_stopped(server, quiet=as_json)
    finally:
        server.stop()


def serve_until_stopped(server: "Server", *, quiet: bool = False) -> None:
    """Say where the composite answers, and wait for Ctrl-C or SIGTERM.

    Raises:
        ServeError: if an engine dies.
    """
    endpoint = server.endpoint
    if not quiet:
        engines = ", ".join(f"{name} ({kind})" for name, kind in endpoint.engines.items())
        click.echo(f"{endpoint.model} answers at {endpoint.url}/v1 with {engines}; Ctrl-C stops it")
        for note in endpoint.notes:
            click.echo(f"note: {note}")
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    while not stopped.wait(1.0):
        dead = server.dead_engines()
        if dead:
            raise ServeError(f"the engine of expert '{dead[0]}' died; its log is {server.supervisor.logs}")
