"""`plan`: what a run would do and cost."""

import tempfile
from pathlib import Path

import click
from rich.filesize import decimal

from composer.cli.options import json_option, print_json, recipe_arguments
from composer.recipe import load_recipe


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

    downloads = missing_downloads(loaded.zoo)
    if downloads:
        _tell_downloads(downloads, as_json)
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


def _tell_downloads(downloads: dict[str, int], as_json: bool) -> None:
    """Say what has to be here before the zoo can be compared."""
    if as_json:
        print_json({"downloads": downloads})
        return
    for repository, size in downloads.items():
        click.echo(f"not here yet: {repository}, {decimal(size)}")
    click.echo(
        f"'run' and 'cluster' download them first ({decimal(sum(downloads.values()))}); "
        "clusters, merges and their cost are known after that"
    )
