"""The plan: what will be merged, and what the run will cost, before anything is made.

Door: `make_plan`.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from composer.clustering import Cluster
from composer.errors import MergeError, RecipeError
from composer.evaluation.scorer import check as check_scorer
from composer.merging.operators import OPERATORS
from composer.merging.plan import Advice, MergePlan
from composer.merging.strategies import STRATEGIES, Foresighted
from composer.mixture.shapes import check_level, check_tokenizers
from composer.recipe import Recipe
from composer.registry import nearest
from composer.similarity.gate import difference
from composer.value import Value
from composer.zoo.checkpoint import Checkpoint, Zoo
from routers import SIMPLE

# Rough constants, for estimates that are right within a factor of two or three on an ordinary CPU.
PROCESS_GB = 1.0
"""Memory of a Python process with torch and transformers, in GB."""
ENGINE_GB = 1.3
"""Memory of an engine besides weights and key-value cache, in GB."""
ENGINE_START = 30.0
"""Seconds an engine takes to start."""
MERGE_RATE = 150e6
"""Bytes of input merged and written per second."""
TRIAL_RATE = 1e9
"""Bytes of input merged per second into a living model."""
LOAD_SECONDS = 1.5
"""Seconds it takes to load a checkpoint."""
FLOPS = 1e11
"""Floating-point operations per second when scoring short items."""
ITEM_TOKENS = 300
"""Tokens an item costs over all its choices."""
ITEM_SECONDS = 0.01
"""Seconds an item costs however small the model is."""
BATCH_TOKENS = 512
"""Tokens of the longest sequence in a batch; its logits are held twice, in float32."""
FIXED_SECONDS = 25.0
"""Imports and loading of tasks."""

MERGED = "merged-"
"""What names of merges that strategies make begin with."""


class Cost(Value):
    """An estimate of what a run takes."""

    memory_gb: float
    """The highest use of RAM at any one time."""
    disk_gb: float
    """What is written and kept, if every merge is kept."""
    seconds: float
    evaluations: int
    """Checkpoints scored on the proxy split, at most."""
    trials: int
    """Merges tried in memory and scored on the proxy split, at most."""
    merges: int
    """Merges written, at most."""
    engines: int
    """Engines started, at least."""


class Plan(Value):
    """What will happen in the merge stage and after it."""

    clusters: tuple[Cluster, ...]
    merges: tuple[MergePlan, ...]
    """One per cluster, in the same order."""
    cost: Cost
    notes: tuple[str, ...] = ()
    """What whoever approves it should know."""


def make_plan(
    recipe: Recipe,
    zoo: Zoo,
    clusters: tuple[Cluster, ...],
    *,
    proxy_items: int,
    held_out_items: int,
    advise: Callable[[list[Checkpoint]], Advice] | None = None,
) -> Plan:
    """Plan every cluster by the recipe's strategy and estimate the cost.

    Args:
        recipe: The recipe.
        zoo: The described models.
        clusters: From `composer.clustering`.
        proxy_items: Items in the proxy split, over all tasks.
        held_out_items: Items in the held-out split, over all tasks.
        advise: Predicts merges of some checkpoints; asked only by strategies that go by it.

    Raises:
        MergeError: if the recipe asks for a merge that cannot be made, e.g. across clusters or of a skipped model.
        RecipeError: if two clusters have the same example requests, or the models do not fit the mixture's level.
        ServeError: if models are to be scored by an engine that is not installed.
    """
    _check_examples(zoo, clusters)
    _check_level(recipe, zoo)
    _check_skipped(recipe, zoo)
    _check_parameters(recipe, zoo)
    _check_experts(recipe, zoo)
    _check_bases(recipe, zoo)
    if any(len(cluster.members) > 1 for cluster in clusters) and recipe.merge.strategy != "none":
        check_scorer(recipe.evaluate)
    plans = []
    for cluster in clusters:
        # A merge needs two, whatever the strategy.
        name = recipe.merge.strategy if len(cluster.members) > 1 else "none"
        strategy = STRATEGIES.get(name)
        planned = strategy.plan(cluster, recipe.merge)
        if advise is not None and isinstance(strategy, Foresighted):
            planned = strategy.foresee(planned, advise([zoo[one] for one in cluster.members]), recipe.merge)
        plans.append(planned)
    return Plan(
        clusters=clusters,
        merges=tuple(plans),
        cost=estimate(
            zoo,
            clusters,
            plans,
            recipe,
            proxy_items,
            held_out_items,
            written=sum(one.size_bytes for one in zoo.members if not one.source.whole),  # folded in or dequantised
        ),
        notes=_notes(zoo, clusters, recipe),
    )


def _check_examples(zoo: Zoo, clusters: tuple[Cluster, ...]) -> None:
    seen: dict[frozenset[str], str] = {}
    for cluster in clusters:
        given = frozenset(text for name in cluster.members for text in zoo.examples.get(name, ()))
        other = seen.setdefault(given, cluster.id)
        if given and other != cluster.id:
            raise RecipeError(
                f"{other} and {cluster.id} ({', '.join(cluster.members)}) have the same example requests, so nothing "
                f"tells them apart; give others under zoo.models.{cluster.members[0]}.examples, or none: they are then "
                "found in what it is good at"
            )


def _check_level(recipe: Recipe, zoo: Zoo) -> None:
    section, members = recipe.mixture, zoo.members
    if not section.inside or len(members) < 2:
        return
    if section.level == "model":
        check_tokenizers(members, section.top_k)
        return
    check_level(section.level, members, members[0])
    if section.dense_layers >= (members[0].layers or 0):
        raise RecipeError(
            f"mixture.dense_layers: {section.dense_layers} leaves no layer to the experts; "
            f"'{members[0].id}' has {members[0].layers}"
        )
    for one in members[1:] if section.dense == "average" else ():
        found = difference(members[0], one)
        if found is not None:
            raise RecipeError(f"mixture.dense: average cannot be made of '{members[0].id}' and '{one.id}': {found}")


def _notes(zoo: Zoo, clusters: tuple[Cluster, ...], recipe: Recipe) -> tuple[str, ...]:
    return (*_size_note(zoo, clusters, recipe), *_example_note(zoo, clusters, recipe))


def _size_note(zoo: Zoo, clusters: tuple[Cluster, ...], recipe: Recipe) -> tuple[str, ...]:
    most, every = recipe.mixture.max_parameters, sum(one.parameters for one in zoo.members)
    if most is None or every <= most:
        return ()
    merged = sum(max(zoo[name].parameters for name in one.members) for one in clusters)
    return (
        f"{merged:,} parameters if every cluster becomes one model, {every:,} if no merge pays; at most {most:,} are "
        "allowed, so experts that score lowest on the proxy items may be left out",
    )


def _example_note(zoo: Zoo, clusters: tuple[Cluster, ...], recipe: Recipe) -> tuple[str, ...]:
    silent = [one for one in clusters if not any(zoo.examples.get(name) for name in one.members)]
    if not silent or len(clusters) < 2 or recipe.mixture.router.kind in SIMPLE:
        return ()
    names = ", ".join(f"{one.id} ({', '.join(one.members)})" for one in silent)
    return (
        f"{names} {'has' if len(silent) == 1 else 'have'} no example requests; they will be taken from model cards, "
        "the tasks it is best at or the texts it predicts best. 5 to 10 under zoo.models.ID.examples route better",
    )


def _check_bases(recipe: Recipe, zoo: Zoo) -> None:
    section = recipe.merge
    used = [one.operator for one in section.merges] if section.strategy == "fixed" else section.searched
    for name in used if section.strategy != "none" else ():
        if OPERATORS.get(name).start == "base" and zoo.base is None:
            raise MergeError(f"operator '{name}' works on task vectors; set zoo.base in the recipe")


def _check_parameters(recipe: Recipe, zoo: Zoo) -> None:
    most, least = recipe.mixture.max_parameters, min(zoo.members, key=lambda one: one.parameters)
    if most is not None and least.parameters > most:
        raise RecipeError(
            f"mixture.max_parameters: {most:,} is less than the smallest model has, '{least.id}' ({least.parameters:,})"
        )


def _check_experts(recipe: Recipe, zoo: Zoo) -> None:
    """Refuse names of experts that there cannot be; which merges are kept is known later."""
    made = tuple(one.name for one in recipe.merge.merges)
    section = recipe.mixture
    named = {"router.abstain_to": [section.router.abstain_to], "router.weights": section.router.weights}
    for key, names in {**named, "dense": [section.dense]}.items():
        for name in names:
            if name not in ("auto", "average", *zoo.ids, *made) and not name.startswith(MERGED):
                close = nearest(name, [*zoo.ids, *made])
                raise RecipeError(
                    f"mixture.{key}: '{name}' can be no expert{close}; experts are the zoo's models, and merges "
                    f"({MERGED}…)"
                )


def _check_skipped(recipe: Recipe, zoo: Zoo) -> None:
    for merge in recipe.merge.merges:
        for name in merge.models:
            if name in zoo.skipped:
                raise MergeError(
                    f"merge '{merge.name}' uses '{name}', which was skipped ({zoo.skipped[name]}); "
                    "mend the model, or take it out of the merge"
                )


class Priced(Protocol):
    """A model as far as costs hang on it."""

    @property
    def id(self) -> str:
        """Its name."""
        ...

    @property
    def parameters(self) -> int:
        """How many it has."""
        ...

    @property
    def size_bytes(self) -> int:
        """Size of its weights."""
        ...

    @property
    def vocabulary_size(self) -> int | None:
        """Rows of its output head."""
        ...


class PricedZoo(Protocol):
    """Models by their names."""

    @property
    def members(self) -> Sequence[Priced]:
        """All of them."""
        ...

    def __getitem__(self, name: str) -> Priced: ...


def estimate(
    zoo: PricedZoo,
    clusters: Sequence[Cluster],
    plans: Sequence[MergePlan],
    recipe: Recipe,
    proxy: int,
    held_out: int,
    *,
    written: int = 0,
) -> Cost:
    """Estimate what a run takes.

    Args:
        zoo: Its models.
        clusters: Which of them may be merged.
        plans: One for each cluster.
        recipe: The recipe.
        proxy: Proxy items, over all tasks.
        held_out: Held-out items, over all tasks.
        written: Bytes of models that are written out before they are merged.
    """
    largest = max(zoo.members, key=lambda member: member.parameters)
    served = [zoo[cluster.members[0]] for cluster in clusters]
    # Experts inside one model are written as one, beside the dense model that holds them.
    inside = recipe.mixture.inside and len(zoo.members) > 1
    engines = 1 if inside else len(served)
    disk = sum(plan.merges * zoo[plan.members[0]].size_bytes for plan in plans)
    disk += written
    if inside:
        disk += sum(one.size_bytes for one in zoo.members) + largest.size_bytes
    seconds = FIXED_SECONDS + engines * ENGINE_START
    for plan in plans:
        size = sum(zoo[name].size_bytes for name in plan.members)
        seconds += plan.merges * size / MERGE_RATE
        seconds += plan.evaluations * _score_seconds(zoo[plan.members[0]], proxy)
        trial = size / TRIAL_RATE + _score_seconds(zoo[plan.members[0]], proxy) - LOAD_SECONDS
        seconds += plan.trials * trial / (recipe.workers or 1)
    seconds += sum(_score_seconds(member, held_out) for member in zoo.members)
    averaged = [zoo[cluster.members[0]] for cluster in clusters if len(cluster.members) > 1]
    seconds += sum(_score_seconds(one, held_out) for one in averaged)  # uniform averages, to compare with
    seconds += _score_seconds(largest, held_out) * (len(zoo.members) if inside else 1)  # the composite
    serving = PROCESS_GB + sum(ENGINE_GB + 4e-9 * one.parameters + recipe.serve.kv_cache_mb / 1024 for one in served)
    logits = 8e-9 * recipe.evaluate.batch_size * BATCH_TOKENS * max(m.vocabulary_size or 0 for m in zoo.members)
    merging = PROCESS_GB + 3 * 4e-9 * largest.parameters + logits
    return Cost(
        memory_gb=round(max(serving, merging), 1),
        disk_gb=round(disk / 1e9, 3),
        seconds=round(seconds),
        evaluations=sum(plan.evaluations for plan in plans),
        trials=sum(plan.trials for plan in plans),
        merges=sum(plan.merges for plan in plans),
        engines=engines,
    )


def _score_seconds(checkpoint: Priced, items: int) -> float:
    return LOAD_SECONDS + items * (ITEM_SECONDS + 2.0 * checkpoint.parameters * ITEM_TOKENS / FLOPS)
