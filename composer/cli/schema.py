"""`schema`: the JSON Schema of recipes, for editors."""

import click

from composer.cli.options import print_json
from composer.recipe import json_schema


@click.command("schema")
def command() -> None:
    """Print the JSON Schema of recipes, for editors."""
    print_json(json_schema())
