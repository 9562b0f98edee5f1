"""Which model of a group the others were fine-tuned from, by geometry."""

from collections.abc import Callable
from itertools import combinations
from math import sqrt

from composer.similarity.moments import Moments
from composer.zoo import Checkpoint

FEWEST_TO_INFER = 4
LOW, HIGH = 0.25, 0.4
"""Seen from their base, fine-tunes point in unrelated directions: mean cosine near 0. Seen from one fine-tune, the
others share the way back to the base: mean cosine near 1/2. The base is the one model below LOW where all others
are above HIGH."""


def infer_base(
    group: list[Checkpoint], load: Callable[[Checkpoint, Checkpoint, Checkpoint | None], Moments]
) -> tuple[Checkpoint | None, str]:
    """Return the member that the others were fine-tuned from, and the evidence; or None and why none is known.

    Args:
        group: Models of one shape, at least `FEWEST_TO_INFER`.
        load: Gives the moments of two of them less a third, which are those of the pair's task vectors if the third
            is the base. All are taken less the first model: weights themselves agree in so many digits that
            distances between them would be rounding errors.
    """
    squares = _squared_distances(group, load)
    means = [_mean_cosine(origin, squares) for origin in range(len(group))]
    order = sorted(range(len(group)), key=lambda index: means[index])
    best, second = order[0], order[1]
    if means[best] < LOW and means[second] > HIGH:
        return group[best], (
            f"inferred: seen from {group[best].id} the others point in unrelated directions (mean cosine "
            f"{means[best]:.2f}, against {means[second]:.2f} seen from {group[second].id})"
        )
    return None, (
        f"no base is given and none stands out (mean cosine of the others seen from {group[best].id}: "
        f"{means[best]:.2f}); set zoo.base"
    )


def _squared_distances(
    group: list[Checkpoint], load: Callable[[Checkpoint, Checkpoint, Checkpoint | None], Moments]
) -> list[list[float]]:
    table = [[0.0] * len(group) for _ in group]
    for i, j in combinations(range(1, len(group)), 2):
        moments = load(group[i], group[j], group[0])
        first, second = sum(moments.first_squares), sum(moments.second_squares)
        table[0][i] = table[i][0] = first
        table[0][j] = table[j][0] = second
        table[i][j] = table[j][i] = max(0.0, first + second - 2 * sum(moments.dots))
    return table


def _mean_cosine(origin: int, squares: list[list[float]]) -> float:
    """Return the mean cosine between the ways from one model to all others, by the law of cosines."""
    cosines = []
    others = [index for index in range(len(squares)) if index != origin]
    for i in others:
        for j in others:
            sides = sqrt(squares[origin][i] * squares[origin][j])
            if j < i and sides:
                cosines.append((squares[origin][i] + squares[origin][j] - squares[i][j]) / (2 * sides))
    return sum(cosines) / len(cosines) if cosines else 1.0
