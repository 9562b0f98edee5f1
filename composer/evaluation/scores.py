"""Scores, kept item by item so that comparisons can be paired."""

from collections.abc import Callable, Mapping
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
    weight: float = 1.0
    """How much the task counts in means over tasks, against others."""

    @property
    def label(self) -> str:
        """The task, with how often it counts where that is not once."""
        return self.task if self.weight == 1 else f"{self.task} (×{self.weight:g})"

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
        """The mean over tasks, by their weights."""
        return fmean((task.mean for task in self.tasks), [task.weight for task in self.tasks])

    def task(self, name: str) -> TaskScore:
        """Return the score of one task."""
        return next(task for task in self.tasks if task.task == name)

    def weighted(self, weights: Mapping[str, float]) -> "Scores":
        """Return the same scores with the weights of a recipe; tasks that it names none for count once."""
        tasks = (task.model_copy(update={"weight": weights.get(task.task, 1.0)}) for task in self.tasks)
        return self.model_copy(update={"tasks": tuple(tasks)})

    def on(self, name: str) -> "Scores":
        """Return the scores of one task alone."""
        return self.model_copy(update={"tasks": (self.task(name),)})


Scorer = Callable[[Checkpoint], Scores]
"""Scores a checkpoint on the proxy split."""
