"""`plan`: what a run would do and cost."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.filesize import decimal

from composer.cli.options import json_option, print_json, recipe_arguments
from composer.errors import ZooError
from composer.recipe import load_recipe

if TYPE_CHECKING:
    from composer.recipe import Recipe


@click.command("plan")
@recipe_arguments
@json_option
def command(recipe: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show what a run would do, with RAM, disk and time; nothing is made or kept."""
    loaded = load_recipe(recipe, list(overrides))
    from composer.artefacts import Store
    from composer.cli.progress import progress_bar
    from composer.preview import preview
    from composer.zoo import missing_downloads

    stated = any(entry.parameters for entry in loaded.zoo.models)
    try:
        downloads = missing_downloads(loaded.zoo.model_copy(update={"on_error": "stop"}) if stated else loaded.zoo)
    except ZooError:
        downloads = None  # what cannot be asked may be stated
    if downloads is None or downloads:
        _tell_outline(loaded, downloads or {}, as_json)
        return
    with (
        tempfile.TemporaryDirectory(prefix="model-composer-") as scratch,
        progress_bar(quiet=as_json) as progress,
    ):
        plan, zoo = preview(loaded, Store(Path(scratch)), progress)
    if as_json:
        print_json(plan.model_dump(mode="json"))
    else:
        from composer.cli.tables import print_plan

        print_plan(plan, zoo)


def _tell_outline(recipe: "Recipe", downloads: dict[str, int], as_json: bool) -> None:
    """Say what has to be here before the zoo can be compared, and what a run takes at most."""
    from composer.artefacts import Store
    from composer.cli.tables import print_outline
    from composer.outline import outline

    with tempfile.TemporaryDirectory(prefix="model-composer-") as scratch:
        found = outline(recipe, Store(Path(scratch)))
    if as_json:
        print_json({"downloads": downloads, "outline": found.model_dump(mode="json")})
        return
    print_outline(found)
    for repository, size in downloads.items():
        click.echo(f"not here yet: {repository}, {decimal(size)}")
    if downloads:
        click.echo(
            f"'run' and 'cluster' download them first ({decimal(sum(downloads.values()))}); "
            "clusters, merges and their cost are known after that"
        )
