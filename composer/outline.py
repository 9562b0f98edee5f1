"""What a run would cost that cannot be planned yet, since its models are not here: from headers, or declared sizes.

Door: `outline`.
"""

from dataclasses import dataclass

from composer.artefacts import Store
from composer.clustering import Cluster
from composer.errors import ZooError
from composer.merging.strategies import STRATEGIES
from composer.planning import Cost, estimate
from composer.recipe import Recipe
from composer.value import Value
from composer.zoo import ModelReference, describe, describe_remote
from composer.zoo.hub import is_hub_id

BYTES = 2
"""A declared parameter takes on disk: bfloat16 or float16."""
VOCABULARY = 128_000
"""Tokens of a model of which only the size is declared."""
ITEMS = 1_000
"""Items a task has, where the recipe sets no limit."""


class Outlined(Value):
    """One model as far as it is known."""

    id: str
    parameters: int
    size_bytes: int
    vocabulary_size: int
    family: str
    """Models of one family may turn out to belong together."""
    declared: bool
    """Whether the recipe said so, and nobody else could be asked."""


class Outline(Value):
    """The most that a run can take."""

    models: tuple[Outlined, ...]
    clusters: tuple[tuple[str, ...], ...]
    """Models that have one shape; which of them are alike is known once they are here."""
    cost: Cost
    download_bytes: int
    """Of all models and the base, whatever is here already."""
    unreachable: str | None = None
    """Why the hub could not be asked, if it could not."""


@dataclass(frozen=True)
class _Zoo:
    members: tuple[Outlined, ...]

    def __getitem__(self, name: str) -> Outlined:
        return next(one for one in self.members if one.id == name)


def outline(recipe: Recipe, store: Store) -> Outline:
    """Price a recipe without its models: as if all models of one shape were alike, and nothing were merged after all.

    Raises:
        ZooError: if the hub does not say what a model is, and the recipe does not either.
    """
    models: list[Outlined] = []
    unreachable = None
    for entry in recipe.zoo.models:
        try:
            models.append(_asked(entry.id, entry.reference, store))
        except ZooError as error:
            if entry.parameters is None:
                raise ZooError(
                    f"{error}. 'plan' can go by sizes that the recipe states: zoo.models.{entry.id}.parameters"
                ) from None
            unreachable = unreachable or str(error)
            models.append(_declared(entry.id, entry.parameters))
    families = dict.fromkeys(one.family for one in models)
    groups = tuple(tuple(one.id for one in models if one.family == family) for family in families)
    clusters = tuple(
        Cluster(id=f"cluster-{place}", members=group, representative=group[0], reason="one shape; not compared yet")
        for place, group in enumerate(groups, start=1)
    )
    zoo = _Zoo(tuple(models))
    plans = [
        STRATEGIES.get(recipe.merge.strategy if len(one.members) > 1 else "none").plan(one, recipe.merge)
        for one in clusters
    ]
    section = recipe.evaluate
    proxy, held_out = (len(section.tasks) * (limit or ITEMS) for limit in (section.proxy_limit, section.held_out_limit))
    cost = estimate(zoo, clusters, plans, recipe, proxy, held_out)
    sizes = sum(one.size_bytes for one in models)
    base = models[0].size_bytes if recipe.zoo.base and is_hub_id(recipe.zoo.base) else 0
    return Outline(
        models=tuple(models), clusters=groups, cost=cost, download_bytes=sizes + base, unreachable=unreachable
    )


def _asked(name: str, reference: ModelReference, store: Store) -> Outlined:
    found = describe_remote(name, reference) if reference.repository else describe(name, reference, store)
    return Outlined(
        id=name,
        parameters=found.parameters,
        size_bytes=found.size_bytes,
        vocabulary_size=found.vocabulary_size or VOCABULARY,
        family=f"{found.architecture} {found.hidden_size} {found.layers} {found.intermediate_size} {found.heads}",
        declared=False,
    )


def _declared(name: str, parameters: int) -> Outlined:
    # Fine-tunes differ by a few rows of their vocabulary: two digits tell families apart.
    return Outlined(
        id=name,
        parameters=parameters,
        size_bytes=BYTES * parameters,
        vocabulary_size=VOCABULARY,
        family=f"{parameters:.1e}",
        declared=True,
    )
