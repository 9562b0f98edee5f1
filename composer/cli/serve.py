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
@click.argument("run", required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--zoo", type=click.Path(path_type=Path), help="Compose from this recipe or folder, too: model 'composer'."
)
@click.option("--trust-remote-code", is_flag=True, help="Let an exported composite run Python code of its models.")
@json_option
def command(
    run: str | None, overrides: tuple[str, ...], zoo: Path | None, trust_remote_code: bool, as_json: bool
) -> None:
    """Serve the composite of a run until Ctrl-C. RUN is a path, a run's or a recipe's name, or what 'export' wrote.

    The recipe's serve settings can be overridden: model-composer serve quickstart port=9000

    With --zoo the endpoint has a model 'composer' as well, with which any chat client asks for composites as in
    'model-composer chat'; what it makes is then served in the place of RUN, which may be left out.
    """
    if run is not None and "=" in run and not Path(run).exists():
        overrides, run = (run, *overrides), None
    if run is None and zoo is None:
        raise click.UsageError("name a RUN to serve, or a --zoo to compose from")
    if zoo is not None:
        _serve_composing(run, overrides, zoo, code=trust_remote_code, as_json=as_json)
        return
    assert run is not None  # noqa: S101 - checked above
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


def _serve_composing(run: str | None, overrides: tuple[str, ...], zoo: Path, *, code: bool, as_json: bool) -> None:
    """Serve the model 'composer', and behind it a composite: of a run, then whatever is made."""
    from composer.cli.progress import progress_bar
    from composer.serving.server import Server
    from composer.serving.web import Web
    from graphs import state
    from graphs.front import NAME, create_front

    if run is None:
        section = section_of(ServeSection, "serve", _prefixed(overrides))
    else:
        directory, section, logs, store = _served(run, overrides, code=code)
    web = Web(section)
    try:
        app = create_front(
            zoo, runs_root(), web.url, state.serving, section.limits, keys=web.keys, loopback=web.loopback
        )
        if run is not None:
            with progress_bar(quiet=as_json) as progress:
                server = Server(directory, section, logs, progress, store, web.url)
                state.adopt(directory, server.__enter__())
        web.start(app)
        if as_json:
            print_json({"url": web.url, "model": NAME})
        else:
            served = state.serving()
            beside = f" and {served.endpoint.model}" if served else ""
            click.echo(f"{NAME}{beside} at {web.url}/v1; Ctrl-C stops")
        stopped = _stop_signal()
        while not stopped.wait(1.0):
            pass
        state.stop()
        web.drain()
    finally:
        state.close()
        web.close()


def _served(run: str, overrides: tuple[str, ...], *, code: bool) -> "tuple[Path, ServeSection, Path, Store]":
    """Return the composite's directory, its settings, where logs go, and the store."""
    settings = _prefixed(overrides)
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


def _prefixed(overrides: tuple[str, ...]) -> list[str]:
    return [one if one.startswith("serve.") else f"serve.{one}" for one in overrides]


def _stop_signal() -> threading.Event:
    """Return what Ctrl-C and SIGTERM set."""
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    return stopped


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
    stopped, told = _stop_signal(), 0
    while not stopped.wait(1.0):
        notes = server.supervisor.notes
        for note in notes[told:]:
            click.echo(f"note: {note}", err=True)
        told = len(notes)
        if set(server.supervisor.states().values()) == {"failed"}:
            raise ServeError(f"no engine is left; their logs are in {server.supervisor.logs}")
