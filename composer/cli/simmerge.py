"""`simmerge`: the predictor of merges: what it is trained on, how good it is, why it chooses what it does."""

from functools import partial
from pathlib import Path

import click

from composer.cli.options import recipe_arguments
from composer.recipe import load_recipe
from composer.runs import runs_root


@click.group("simmerge")
def command() -> None:
    """Collect merges to learn from, train the predictor of merges, and ask it why."""


@command.command("collect")
@recipe_arguments
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="The corpus, a Parquet file."
)
@click.option("--pairs", default=1000, show_default=True, help="Pairs of models that are merged by every arm, at most.")
@click.option(
    "--several", default=0, show_default=True, help="Groups of three and four that are merged by one arm each."
)
@click.option("--store", type=click.Path(path_type=Path, file_okay=False), help="Where what is measured is kept.")
def collect(recipe: Path, overrides: tuple[str, ...], out: Path, pairs: int, several: int, store: Path | None) -> None:
    """Merge the models of a recipe in memory, score the merges on its proxy items, and write a corpus.

    Arms are those of merge.operators. A third of the proxy items is for features, the others give the labels; held-out
    items are not looked at. What was scored before is not scored again.
    """
    loaded = load_recipe(recipe, list(overrides))
    from composer.artefacts import Store
    from composer.cli.progress import progress_bar
    from composer.evaluation.tasks import part_of, split_of
    from composer.executors import make_executor
    from composer.merging.judge import Judge
    from composer.similarity.gate import difference
    from composer.simmerge.arms import arms_of
    from composer.simmerge.collect import KNOWN, draw
    from composer.simmerge.collect import collect as gather_corpus
    from composer.zoo import inspect_zoo, make_whole

    kept = Store((store or runs_root() / "store").resolve())
    section = loaded.merge
    with progress_bar() as progress:
        zoo = inspect_zoo(loaded.zoo, kept, progress)
        for one in [*zoo.members, *([zoo.base] if zoo.base else [])]:
            make_whole(one, kept, progress)
        first = zoo.base or zoo.members[0]
        models = [one for one in zoo.members if one.id == first.id or difference(first, one) is None]
        whole = split_of(loaded.evaluate, "proxy")
        known, labels = part_of(whole, 0, KNOWN), part_of(whole, KNOWN, 1)
        make = partial(Judge, loaded.evaluate, loaded.probes, kept.root, {}, (KNOWN, 1.0))
        executor = make_executor(loaded.executor, make, loaded.workers)
        candidates = draw(
            [one.id for one in models], arms_of(section.operators), pairs=pairs, several=several, seed=section.seed
        )
        try:
            rows = gather_corpus(
                loaded.name,
                models,
                zoo.base,
                candidates,
                known,
                labels,
                loaded.probes,
                kept,
                executor,
                out,
                dtype=section.dtype,
                seed=section.seed,
                progress=progress,
            )
        finally:
            executor.close()
    for one in zoo.members:
        if one not in models:
            click.echo(f"left out: {one.id}, since it cannot be merged with {first.id}: {difference(first, one)}")
    click.echo(f"{rows} rows of {len(candidates)} merges of {len(models)} models: {out}")
