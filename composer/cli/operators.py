"""`operators`: what models can be merged with."""

import dataclasses

import click

from composer.cli.options import json_option, print_json


@click.command("operators")
@click.argument("name", required=False)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List the merge operators; with a NAME, that one with its parameters."""
    from composer.merging.operators import OPERATORS

    names = [OPERATORS.check(name)] if name else OPERATORS.names()
    found = {one: OPERATORS.get(one) for one in names}
    if as_json:
        print_json({one: dataclasses.asdict(operator) for one, operator in found.items()})
        return
    from composer.cli.tables import print_operator, print_operators

    if name:
        print_operator(name, found[name])
    else:
        print_operators(found)
