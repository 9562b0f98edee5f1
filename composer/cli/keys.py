"""`keys`: who may ask an endpoint that listens beyond this machine."""

from pathlib import Path

import click

from composer.cli.options import json_option, print_json
from composer.runs import runs_root
from composer.serving.keys import Keyring, make_key, remove_key

_file = click.option("--file", type=click.Path(path_type=Path), help="The file of keys (serve.keys).")


@click.group("keys")
def command() -> None:
    """API keys of the endpoint: add, ls, rm. Only their hashes are kept."""


@command.command("add")
@click.argument("name")
@_file
def add(name: str, file: Path | None) -> None:
    """Make a key for NAME and print it, this once. Endpoints that run already take it at once."""
    path = file or runs_root() / "keys.json"
    key = make_key(path, name)
    click.echo(key)
    click.echo(f"kept as a hash in {path}; it cannot be shown again", err=True)


@command.command("ls")
@_file
@json_option
def ls(file: Path | None, as_json: bool) -> None:
    """List names of keys."""
    ring = Keyring.read(file or runs_root() / "keys.json")
    if as_json:
        print_json([{"name": one.name, "created": one.created} for one in ring.keys])
    for one in ring.keys if not as_json else ():
        click.echo(f"{one.name}  {one.created}")


@command.command("rm")
@click.argument("name")
@_file
def rm(name: str, file: Path | None) -> None:
    """Remove the key of NAME; it opens nothing any more."""
    remove_key(file or runs_root() / "keys.json", name)
