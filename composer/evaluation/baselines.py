"""Baselines that need no search: what a plain average, a coin and hindsight would score.

The uniform average is a model, made by the merging room and scored like any other; random routing and the oracle
follow from what the experts score, so no model runs for them.
"""

from collections.abc import Sequence
from statistics import fmean

from composer.evaluation.evidence import Subject
from composer.evaluation.scores import Scores

RANDOM = "random routing"
ORACLE = "best expert per task"
"""Names with a space, which no model of a recipe can have."""


def average_of(cluster: str) -> str:
    """Return what the uniform average of a cluster is called."""
    return f"uniform average of {cluster}"


def without_a_router(experts: Sequence[Scores]) -> list[Subject]:
    """Return what uniform random routing and a per-task oracle over some experts score.

    Random routing sends every item to any expert with the same probability: an item's value is the mean of what the
    experts score on it, which is its expectation. The oracle sends each task to the expert that turns out best on
    these very items, so it is a bound for routing by task and not something that could be built.

    Args:
        experts: What each expert scores on the same items; with fewer than two there is nothing to route between.
    """
    if len(experts) < 2:
        return []
    spread, best = [], []
    for task in experts[0].tasks:
        own = [one.task(task.task) for one in experts]
        items = {item: fmean(one.items[item] for one in own) for item in task.items}
        spread.append(task.model_copy(update={"items": items}))
        best.append(max(own, key=lambda one: one.mean))
    split = experts[0].split
    return [
        Subject(role="random", scores=Scores(subject=RANDOM, split=split, tasks=tuple(spread))),
        Subject(role="oracle", scores=Scores(subject=ORACLE, split=split, tasks=tuple(best))),
    ]
