"""`plan`: what a run would do and cost."""

import tempfile
from pathlib import Path

import click

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
    from composer.clustering import cluster
    from composer.evaluation.tasks import split_of
    from composer.planning import make_plan
    from composer.similarity import compare
    from composer.zoo import inspect_zoo

    with (
        tempfile.TemporaryDirectory(prefix="model-composer-") as scratch,
        progress_bar(quiet=as_json) as progress,
    ):
        zoo = inspect_zoo(loaded.zoo, Store(Path(scratch)), progress)
        clusters = cluster(compare(zoo, progress), loaded.cluster.threshold)
        plan = make_plan(
            loaded,
            zoo,
            clusters,
            proxy_items=split_of(loaded.evaluate, "proxy").size,
            held_out_items=split_of(loaded.evaluate, "held_out").size,
        )
    if as_json:
        print_json(plan.model_dump(mode="json"))
    else:
        from composer.cli.tables import print_plan

        print_plan(plan, zoo)
