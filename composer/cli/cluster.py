"""`cluster`: which models of a recipe belong together."""

from pathlib import Path

import click

from composer.cli.options import json_option, print_json, recipe_arguments
from composer.recipe import load_recipe
from composer.runs import runs_root


@click.command("cluster")
@recipe_arguments
@click.option("--suggest", "suggesting", is_flag=True, help="Say where the natural gap lies, and use it.")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Draw heatmap and dendrogram here.")
@json_option
def command(recipe: Path, overrides: tuple[str, ...], suggesting: bool, html: Path | None, as_json: bool) -> None:
    """Show which models of a recipe belong together, and why.

    Compares all pairs by the recipe's cluster.signal (weights, deltas, logits, hidden); what was compared before is
    not read again. Nothing is merged.
    """
    loaded = load_recipe(recipe, list(overrides))
    from composer.artefacts import Store
    from composer.cli.progress import progress_bar
    from composer.clustering import cluster, joins, suggest
    from composer.similarity import compare
    from composer.zoo import inspect_zoo

    store = Store(runs_root() / "store")
    section = loaded.cluster
    with progress_bar(quiet=as_json) as progress:
        zoo = inspect_zoo(loaded.zoo, store, progress)
        skip = loaded.zoo.on_error == "skip"
        matrix = compare(zoo, store, section, loaded.probes, skip_broken=skip, progress=progress)
    skipped = {**zoo.skipped, **matrix.skipped}
    suggestion = suggest(matrix, section)
    if suggesting and suggestion.threshold is not None:
        section = section.model_copy(update={"threshold": suggestion.threshold})
    clusters = cluster(matrix, section)
    if html is not None:
        from composer.report import write_clusters

        write_clusters(matrix, clusters, joins(matrix, section), section.threshold, skipped, html)
    if as_json:
        print_json(
            {
                "clusters": [one.model_dump(mode="json") for one in clusters],
                "similarity": matrix.model_dump(mode="json"),
                "threshold": section.threshold,
                "suggestion": suggestion.model_dump(mode="json"),
                "skipped": skipped,
            }
        )
        return
    from composer.cli.tables import print_clusters

    print_clusters(matrix, clusters, skipped)
    if suggesting:
        click.echo(suggestion.in_words())
    if html is not None:
        click.echo(f"heatmap and dendrogram: {html.resolve()}")
