"""`inspect`: what models are, from their headers and configuration."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from composer.cli.options import json_option, print_json
from composer.errors import ZooError
from composer.runs import runs_root

if TYPE_CHECKING:
    from composer.artefacts import Store
    from composer.progress import Progress
    from composer.zoo import Description, ModelReference


@click.command("inspect")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--adapter", help="Fold a LoRA adapter (a directory or hub id) into the model.")
@click.option("--file", help="The GGUF file, in a directory or repository of several.")
@click.option("--hash", "hashed", is_flag=True, help="Read all weights once and show the content hash too.")
@click.option("--trust-remote-code", is_flag=True, help="Let models bring Python of their own.")
@json_option
def command(
    models: tuple[str, ...],
    adapter: str | None,
    file: str | None,
    hashed: bool,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Describe models without loading their weights.

    MODEL is a directory, a GGUF file, a hub id (owner/name or owner/name@revision), or a recipe: then all of its
    models. Of a model on the hub only the headers are downloaded. A model that cannot be used is listed with the
    reason, and the exit code is 3.
    """
    from composer.artefacts import Store
    from composer.cli.progress import progress_bar
    from composer.zoo.references import ModelReference, absolute

    references: dict[str, ModelReference] = {}
    for text in models:
        if text.endswith((".yaml", ".yml")):
            references |= _of_recipe(Path(text))
        else:
            model = absolute(text, Path.cwd())
            folded = absolute(adapter, Path.cwd()) if adapter else None
            references[text] = ModelReference(model=model, adapter=folded, file=file)
    store = Store(runs_root() / "store")
    found: dict[str, Description] = {}
    failed: dict[str, ZooError] = {}
    with progress_bar(quiet=as_json) as progress:
        for name, reference in references.items():
            try:
                found[name] = _described(name, reference, store, hashed, trust_remote_code, progress)
            except ZooError as error:
                failed[name] = error
    if as_json:
        print_json(
            {
                "models": [one.model_dump(mode="json") for one in found.values()],
                "failed": {name: str(error) for name, error in failed.items()},
            }
        )
    else:
        from composer.cli.tables import print_descriptions

        print_descriptions(list(found.values()))
        for reason in failed.values():
            click.echo(f"error: {reason}", err=True)
    if failed:
        raise click.exceptions.Exit(next(iter(failed.values())).exit_code)


def _of_recipe(path: Path) -> "dict[str, ModelReference]":
    from composer.recipe import load_recipe
    from composer.zoo.references import ModelReference

    section = load_recipe(path).zoo
    found = {entry.id: entry.reference for entry in section.models}
    return {**found, "base": ModelReference(model=section.base)} if section.base else found


def _described(
    name: str, reference: "ModelReference", store: "Store", hashed: bool, code: bool, progress: "Progress"
) -> "Description":
    from composer.zoo import describe, describe_remote, inspect_checkpoint

    if hashed:
        return inspect_checkpoint(name, reference, store, trust_remote_code=code, progress=progress)
    if reference.repository and not reference.adapter and not reference.file:
        return describe_remote(name, reference)
    return describe(name, reference, store, trust_remote_code=code, progress=progress)
