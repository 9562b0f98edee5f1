"""Scores, kept item by item so that comparisons can be paired."""

from collections.abc import Callable
from math import sqrt
from statistics import fmean, stdev

from composer.value import Value
from composer.zoo.checkpoint import Checkpoint


class TaskScore(Value):
    """What one subject scored on the items of one task."""

    task: str
    metric: str
    items: dict[str, float]
    """Item hash to value; higher is better."""

    @property
    def mean(self) -> float:
        """The mean over items."""
        return fmean(self.items.values())

    @property
    def standard_error(self) -> float:
        """The standard error of the mean; infinite for fewer than two items."""
        count = len(self.items)
        return stdev(self.items.values()) / sqrt(count) if count > 1 else float("inf")


class Scores(Value):
    """What one subject scored on every task of one split."""

    subject: str
    """A checkpoint's or composite's id."""
    split: str
    """"proxy" or "held_out"."""
    tasks: tuple[TaskScore, ...]

    @property
    def mean(self) -> float:
        """The unweighted mean over tasks."""
        return fmean(task.mean for task in self.tasks)

    def task(self, name: str) -> TaskScore:
        """Return the score of one task."""
        return next(task for task in self.tasks if task.task == name)

    def on(self, name: str) -> "Scores":
        """Return the scores of one task alone."""
        return self.model_copy(update={"tasks": (self.task(name),)})


Scorer = Callable[[Checkpoint], Scores]
"""Scores a checkpoint on the proxy split."""
