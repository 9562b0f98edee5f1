"""What a model answers: the log-likelihood of every choice of every item, kept beside its scores.

From them one can tell what a model would score whose log-likelihoods were others, a blend of those of several models
for one, without running any.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import exp, isfinite, log
from typing import TYPE_CHECKING, Any

from composer.value import Value

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FAR = -1e4
"""Log-likelihood of a choice that nobody would make."""


class TaskAnswers(Value):
    """One model's answers to the items of one task."""

    task: str
    metric: str
    likelihoods: dict[str, tuple[float, ...]]
    """Log-likelihood of each choice in nats, by item hash; of the one answer where there is nothing to choose."""
    lengths: dict[str, tuple[float, ...]]
    """What the metric divides a log-likelihood by before it compares or averages: 1, characters or bytes."""
    values: dict[str, tuple[float, ...]]
    """What the metric gives if a choice is the likeliest; empty where there is nothing to choose."""


class Answers(Value):
    """One model's answers to a split.

    Tasks that generate text, or whose metric cannot be told from log-likelihoods, are not in it.
    """

    subject: str
    split: str
    tasks: tuple[TaskAnswers, ...]

    def task(self, name: str) -> TaskAnswers | None:
        """Return the answers to one task, or None if it has none."""
        return next((one for one in self.tasks if one.task == name), None)


@dataclass(frozen=True)
class AnswerTable:
    """The answers of several models to the items of one task, in one array."""

    likelihoods: "NDArray[np.float64]"
    """`[models, items, choices]`, padded with `FAR`."""
    lengths: "NDArray[np.float64]"
    """`[items, choices]`."""
    values: "NDArray[np.float64] | None"
    """`[items, choices]`; None where there is nothing to choose."""

    @classmethod
    def of(cls, answers: list[TaskAnswers]) -> "AnswerTable":
        """Lay answers of several models to the same items side by side."""
        import numpy as np

        items = list(answers[0].likelihoods)
        widest = max(len(one) for one in answers[0].likelihoods.values())

        def table(rows: Mapping[str, tuple[float, ...]], fill: float) -> "NDArray[np.float64]":
            padded = [[*rows[item], *[fill] * (widest - len(rows[item]))] for item in items]
            return np.array(padded, dtype=np.float64)

        return cls(
            likelihoods=np.stack([table(one.likelihoods, FAR) for one in answers]),
            lengths=table(answers[0].lengths, 1.0),
            values=table(answers[0].values, 0.0) if answers[0].values else None,
        )

    @cached_property
    def chooses(self) -> bool:
        """Whether there is something to choose."""
        return self.values is not None

    def chances(self, likelihoods: "NDArray[np.float64]") -> "NDArray[np.float64]":
        """Return the probability of each choice among the choices, `[..., items, choices]`, as the metric weighs them.

        With log-likelihoods that are divided by lengths, the softmax is of the quotients times the mean length, so
        that it is as sharp as it would be without.
        """
        import numpy as np

        scale = self.lengths.mean(axis=-1, keepdims=True)
        each = likelihoods / self.lengths * scale
        each = np.exp(each - each.max(axis=-1, keepdims=True))
        chances: NDArray[np.float64] = each / each.sum(axis=-1, keepdims=True)
        return chances

    def score(self, likelihoods: "NDArray[np.float64]") -> "NDArray[np.float64]":
        """Return what the metric gives for each item, `[..., items]`, were these the log-likelihoods."""
        import numpy as np

        if self.values is None:
            likely: NDArray[np.float64] = np.exp(np.minimum(likelihoods[..., 0] / self.lengths[:, 0], 0.0))
            return likely
        chosen = (likelihoods / self.lengths).argmax(axis=-1)
        found: NDArray[np.float64] = np.take_along_axis(
            np.broadcast_to(self.values, likelihoods.shape), chosen[..., None], axis=-1
        )[..., 0]
        return found

    def expected(self, likelihoods: "NDArray[np.float64]") -> "NDArray[np.float64]":
        """Return what the metric gives if choices are made by chance as their probabilities have it, `[..., items]`.

        Less noisy than `score`, which jumps where two choices are about as likely.
        """
        if self.values is None:
            return self.score(likelihoods)
        found: NDArray[np.float64] = (self.chances(likelihoods) * self.values).sum(axis=-1)
        return found


def task_answers(items: Any, requests: dict[str, list[Any]], evaluate: Any) -> TaskAnswers | None:
    """Return the answers that stand in lm-eval's requests.

    Args:
        items: The task's items (`composer.evaluation.tasks.Items`).
        requests: lm-eval's answered requests, by item hash.
        evaluate: Gives the metric of each item (a `TaskScore`) for what stands in the requests.

    Returns:
        None if the metric does not follow from log-likelihoods alone.
    """
    if any(request.request_type == "generate_until" for own in requests.values() for request in own):
        return None
    likelihoods = {item: tuple(_number(request.resps[0]) for request in own) for item, own in requests.items()}
    before = {id(request): request.resps for own in requests.values() for request in own}

    def imagine(value: Any) -> dict[str, float]:
        """Return the metric of each item if request number n of it were answered with `value(n)`."""
        for own in requests.values():
            for number, request in enumerate(own):
                request.resps, request.filtered_resps = [_like(before[id(request)][0], value(number))], {}
        try:
            found: dict[str, float] = evaluate(items, requests).items
        finally:
            for request in (one for own in requests.values() for one in own):
                request.resps, request.filtered_resps = before[id(request)], {}
        return found

    if all(len(own) == 1 for own in likelihoods.values()):
        lengths = _lengths_of_likelihood(imagine)
        if lengths is None:
            return None
        values: dict[str, tuple[float, ...]] = {}
    else:
        widest = max(len(own) for own in likelihoods.values())
        each = [imagine(lambda number, chosen=chosen: 0.0 if number == chosen else FAR) for chosen in range(widest)]
        values = {item: tuple(each[n][item] for n in range(len(own))) for item, own in likelihoods.items()}
        lengths = {item: _lengths(items, own, requests[item]) for item, own in likelihoods.items()}
    return TaskAnswers(task=items.name, metric=items.metric, likelihoods=likelihoods, lengths=lengths, values=values)


def _lengths_of_likelihood(imagine: Any) -> dict[str, tuple[float, ...]] | None:
    """Return the n for which the metric is ``exp(log-likelihood / n)``, by item, or None if there is none."""
    first, second = imagine(lambda _: -100.0), imagine(lambda _: -50.0)
    lengths: dict[str, tuple[float, ...]] = {}
    for item, value in first.items():
        if not 0 < value < 1:
            return None
        lengths[item] = (-100.0 / log(value),)
        if not isfinite(lengths[item][0]) or abs(exp(-50.0 / lengths[item][0]) - second[item]) > 1e-6:
            return None
    return lengths


def _lengths(items: Any, own: tuple[float, ...], requests: list[Any]) -> tuple[float, ...]:
    """Return what the metric divides the log-likelihood of each choice by."""
    if items.metric != "acc_norm":
        return (1.0,) * len(own)
    choices = items.task.doc_to_choice(requests[0].doc)
    return tuple(max(1.0, float(len(choice))) for choice in choices)


def _number(answer: Any) -> float:
    return float(answer[0] if isinstance(answer, (tuple, list)) else answer)


def _like(answer: Any, value: float) -> Any:
    """Return an answer of the same kind with another log-likelihood."""
    return (value, value == 0.0) if isinstance(answer, (tuple, list)) else value
