"""`serve`: a composite behind its endpoint."""

import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import click

from composer.artefacts import Store
from composer.cli.options import json_option, print_json
from composer.errors import RecipeError, ServeError
from composer.mixture.composite import MANIFEST, Composite
from composer.recipe import override, section_of
from composer.runs import Run, runs_root
from composer.serving.settings import ServeSection

if TYPE_CHECKING:
    from composer.serving.server import Server


@click.command("serve")
@click.argument("run")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--trust-remote-code", is_flag=True, help="Let an exported composite run Python code of its models.")
@json_option
def command(run: str, overrides: tuple[str, ...], trust_remote_code: bool, as_json: bool) -> None:
    """Serve the composite of a run until Ctrl-C. RUN is a path, a run's or a recipe's name, or what 'export' wrote.

    The recipe's serve settings can be overridden: model-composer serve quickstart port=9000
    """
    from composer.cli.progress import progress_bar
    from composer.serving.server import Server

    directory, section, logs, store = _served(run, overrides, code=trust_remote_code)
    with progress_bar(quiet=as_json) as progress:
        server = Server(directory, section, logs, progress, store).__enter__()
    try:
        if as_json:
            print_json(server.endpoint.model_dump(mode="json"))
        serve_until_stopped(server, quiet=as_json)
    finally:
        server.stop()


def _served(run: str, overrides: tuple[str, ...], *, code: bool) -> "tuple[Path, ServeSection, Path, Store]":
    """Return the composite's directory, its settings, where logs go, and the store."""
    settings = [one if one.startswith("serve.") else f"serve.{one}" for one in overrides]
    if (Path(run) / MANIFEST).is_file():
        own = [one.id for one in Composite.open(Path(run)).experts if one.checkpoint.remote_code]
        if own and not code:
            raise ServeError(
                f"{run}: expert '{own[0]}' needs Python code of its own; refused. If you have read that code, "
                "give --trust-remote-code"
            )
        root = runs_root()
        section = section_of(ServeSection, "serve", settings)
        return Path(run).resolve(), section, root / "logs" / Path(run).resolve().name, Store(root / "store")
    found = Run.find(run, runs_root())
    if not found.composite.exists():
        raise RecipeError(f"{found.name} has no composite yet; 'model-composer run' with its recipe makes it")
    return found.composite.resolve(), override(found.recipe, settings).serve, found.logs, found.store


def serve_until_stopped(server: "Server", *, quiet: bool = False) -> None:
    """Say where the composite answers, and wait for Ctrl-C or SIGTERM; what happens to engines is said as it happens.

    Raises:
        ServeError: if no engine is left.
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
    told = 0
    while not stopped.wait(1.0):
        notes = server.supervisor.notes
        for note in notes[told:]:
            click.echo(f"note: {note}", err=True)
        told = len(notes)
        if set(server.supervisor.states().values()) == {"failed"}:
            raise ServeError(f"no engine is left; their logs are in {server.supervisor.logs}")
