"""`validate`: check a recipe."""

from pathlib import Path

import click

from composer.cli.options import json_option, print_json, recipe_arguments
from composer.recipe import load_recipe


@click.command("validate")
@recipe_arguments
@json_option
def command(recipe: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check a recipe without touching any model."""
    loaded = load_recipe(recipe, list(overrides))
    if as_json:
        print_json({"valid": True, "recipe": loaded.model_dump(mode="json")})
    else:
        click.echo(f"{recipe}: valid ({len(loaded.zoo.models)} models, strategy {loaded.merge.strategy})")
