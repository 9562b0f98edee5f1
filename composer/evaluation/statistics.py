"""Intervals for differences between two subjects on the same items."""

from composer.evaluation.scores import Scores

RESAMPLES = 10_000


def paired_interval(first: Scores, second: Scores, *, seed: int = 0, level: float = 0.95) -> tuple[float, float, float]:
    """Return mean, lower and upper bound of `first - second` on the mean over tasks.

    A percentile bootstrap: items are drawn with replacement within each task, the same ones for both
    subjects (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13).
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    total = np.zeros(RESAMPLES)
    point = 0.0
    for task in first.tasks:
        other = second.task(task.task).items
        differences = np.array([value - other[item] for item, value in task.items.items()])
        point += float(differences.mean())
        drawn = generator.integers(0, len(differences), size=(RESAMPLES, len(differences)))
        total += differences[drawn].mean(axis=1)
    count = len(first.tasks)
    tail = (1 - level) / 2 * 100
    low, high = np.percentile(total / count, [tail, 100 - tail])
    return point / count, float(low), float(high)
