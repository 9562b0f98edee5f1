"""Intervals for differences between two subjects on the same items."""

from dataclasses import dataclass
from math import sqrt
from statistics import fmean, variance

from composer.evaluation.scores import Scores

RESAMPLES = 10_000


def paired_interval(first: Scores, second: Scores, *, seed: int = 0, level: float = 0.95) -> tuple[float, float, float]:
    """Return mean, lower and upper bound of `first - second` on the mean over tasks, by the weights of `first`.

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
        point += task.weight * float(differences.mean())
        drawn = generator.integers(0, len(differences), size=(RESAMPLES, len(differences)))
        total += task.weight * differences[drawn].mean(axis=1)
    count = sum(task.weight for task in first.tasks)
    tail = (1 - level) / 2 * 100
    low, high = np.percentile(total / count, [tail, 100 - tail])
    return point / count, float(low), float(high)


@dataclass(frozen=True)
class Gain:
    """How far one subject is ahead of another on the items both were scored on."""

    mean: float
    """Mean over tasks of the mean difference."""
    error: float
    """Its standard error, from the paired differences within each task."""

    def beyond(self, errors: float) -> bool:
        """Return whether the gain is above zero by more than so many standard errors."""
        return self.mean > errors * self.error and self.mean > 0

    def behind(self, errors: float) -> bool:
        """Return whether even so many standard errors above its mean, the gain is below zero."""
        return self.mean + errors * self.error < 0


def paired_gain(first: Scores, second: Scores) -> Gain:
    """Return how far `first` is ahead of `second` on the items that both have, task by task.

    The standard error of a stratified mean (Cochran, Sampling Techniques, section 5.4), with the weights of `first`;
    a task with one common item adds the variance of nothing.
    """
    means, variances, weights = [], [], []
    for task in first.tasks:
        other = next((one.items for one in second.tasks if one.task == task.task), {})
        differences = [value - other[item] for item, value in task.items.items() if item in other]
        if differences:
            weights.append(task.weight)
            means.append(fmean(differences))
            variances.append(variance(differences) / len(differences) if len(differences) > 1 else 0.0)
    if not means:
        return Gain(0.0, float("inf"))
    squares = sum(weight**2 * own for weight, own in zip(weights, variances, strict=True))
    return Gain(fmean(means, weights), sqrt(squares) / sum(weights))
