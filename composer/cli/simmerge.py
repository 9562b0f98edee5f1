"""`simmerge`: the predictor of merges: what it is trained on, how good it is, why it chooses what it does."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from composer.cli.options import json_option, print_json, recipe_arguments
from composer.errors import MergeError, RecipeError
from composer.recipe import load_recipe
from composer.registry import nearest
from composer.runs import runs_root

if TYPE_CHECKING:
    from composer.zoo import Checkpoint, Zoo


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

    Arms are those of merge.operators, by default all. A third of the proxy items is for features, the others give the
    labels; held-out items are not looked at. What was scored before is not scored again.
    """
    loaded = load_recipe(recipe, list(overrides))
    from composer.artefacts import Store
    from composer.cli.progress import progress_bar
    from composer.evaluation.tasks import part_of, split_of
    from composer.executors import make_executor
    from composer.merging.judge import Judge
    from composer.similarity.gate import difference
    from composer.simmerge.arms import ARMS, arms_of
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
            [one.id for one in models],
            arms_of(section.operators or list(ARMS)),
            pairs=pairs,
            several=several,
            seed=section.seed,
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


@command.command("train")
@click.argument("corpora", nargs=-1, required=True, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="The predictor.")
@click.option("--threads", default=0, help="Threads; by default all.")
def train(corpora: tuple[Path, ...], out: Path, threads: int) -> None:
    """Train a predictor on CORPORA; a recipe uses it by merge.simmerge.predictor."""
    from composer.simmerge.card import card
    from composer.simmerge.corpus import load_corpus
    from composer.simmerge.training import train as learn

    predictor = learn(load_corpus(corpora), threads=threads)
    predictor.pack(out)
    click.echo(card(predictor))
    click.echo(f"{out}: {out.stat().st_size / 1e6:.2f} MB")


@command.command("card")
@click.option("--predictor", type=click.Path(path_type=Path, dir_okay=False), help="By default the program's own.")
@json_option
def show_card(predictor: Path | None, as_json: bool) -> None:
    """Say what the predictor was trained on, how good it is, and when not to trust it."""
    from composer.simmerge.card import card
    from composer.simmerge.predictor import SHIPPED, Predictor

    found = Predictor.unpack(predictor or SHIPPED)
    if as_json:
        print_json(found.card)
    else:
        click.echo(card(found))


@command.command("features")
def features() -> None:
    """List the features that merges are predicted from."""
    from composer.simmerge.card import feature_table

    click.echo(feature_table())


@command.command("explain")
@recipe_arguments
@click.option("--models", required=True, help="Two or more ids of the recipe, with commas between.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw it here (SVG or PNG).")
@json_option
def explain(recipe: Path, overrides: tuple[str, ...], models: str, plot: Path | None, as_json: bool) -> None:
    """Say which merge of some models of a recipe would be chosen, and what speaks for and against it.

    The models are observed once, which takes a forward pass over the proxy items each; nothing is merged.
    """
    loaded = load_recipe(recipe, list(overrides))
    from composer.artefacts import Store
    from composer.cli.progress import progress_bar
    from composer.evaluation.tasks import split_of
    from composer.similarity.gate import difference
    from composer.simmerge import Advisor
    from composer.simmerge.explanation import draw_explanation, explain_merges
    from composer.zoo import inspect_zoo

    store = Store(runs_root() / "store")
    names = [one.strip() for one in models.split(",") if one.strip()]
    with progress_bar(quiet=as_json) as progress:
        zoo = inspect_zoo(loaded.zoo, store, progress)
        chosen = [_member(zoo, name) for name in names]
        for one in chosen[1:]:
            if (reason := difference(chosen[0], one)) is not None:
                raise MergeError(f"'{chosen[0].id}' and '{one.id}' cannot be merged: {reason}")
        proxy = split_of(loaded.evaluate, "proxy")
        advisor = Advisor(
            zoo.base, proxy, loaded.probes, loaded.merge, store, progress=progress, weights=loaded.evaluate.weights
        )
        explanation = explain_merges(advisor, chosen)
    if plot is not None:
        draw_explanation(explanation, plot)
    if as_json:
        print_json(explanation.model_dump(mode="json"))
        return
    click.echo(explanation.in_words())
    if plot is not None:
        click.echo(f"drawn: {plot.resolve()}")


def _member(zoo: "Zoo", name: str) -> "Checkpoint":
    if name not in zoo.ids:
        raise RecipeError(f"the recipe has no model '{name}'{nearest(name, list(zoo.ids))}")
    return zoo[name]
