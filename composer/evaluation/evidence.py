"""Evidence: what the composite gained, against every model it came from and against what needs no search."""

from typing import Literal

from composer.evaluation.scores import Scores
from composer.evaluation.statistics import paired_interval
from composer.evaluation.verdict import verdict_on
from composer.value import Value

Role = Literal["composite", "merged", "source", "base", "average", "random", "oracle"]
REFERENCES = ("average", "random", "oracle")
"""Roles that are there to compare with: nobody serves them, and two of them are no models."""


class Subject(Value):
    """One row of the evidence table."""

    role: Role
    scores: Scores

    @property
    def real(self) -> bool:
        """Whether it is a model of the zoo, or made of it by this run's search."""
        return self.role not in REFERENCES


class Difference(Value):
    """Composite minus another subject, on the mean over tasks, with a 95 % paired bootstrap interval."""

    other: str
    mean: float
    low: float
    high: float


class TaskDifference(Value):
    """Composite minus another subject on one task, with a 95 % paired bootstrap interval."""

    other: str
    task: str
    mean: float
    low: float
    high: float


class Evidence(Value):
    """Held-out scores of the composite and everything it is compared with."""

    split: str
    subjects: tuple[Subject, ...]
    """The composite first, then the other models by falling mean, then what there is to compare with beside them."""
    differences: tuple[Difference, ...]
    by_task: tuple[TaskDifference, ...] = ()
    """Composite minus the best single model, task by task."""
    best_single: str
    """The source model with the highest held-out mean: the baseline that is hardest to beat."""
    verdict: str
    """The result in words."""
    notes: tuple[str, ...] = ()
    """Baselines that are not in the table, with the reason."""
    routing: dict[str, dict[str, int]] = {}
    """For each task: how many held-out items each expert answered."""
    likelihoods: str = "endpoint"
    """Where the composite's likelihoods were computed: "endpoint", or "in process" if the engines cannot."""

    def subject(self, name: str) -> Subject:
        """Return the row called `name`."""
        return next(subject for subject in self.subjects if subject.scores.subject == name)


def weigh_evidence(
    composite: Scores,
    others: list[Subject],
    *,
    notes: tuple[str, ...] = (),
    routing: dict[str, dict[str, int]] | None = None,
    likelihoods: str = "endpoint",
    seed: int = 0,
) -> Evidence:
    """Compare the composite with all others, item by item.

    Args:
        composite: The composite's held-out scores.
        others: Every source model; merged models, the base and references (`composer.evaluation.baselines`) where
            there are any.
        notes: References that are not among them, with the reason.
        routing: How many items each expert answered, by task.
        likelihoods: Where the composite's likelihoods were computed.
        seed: Seed of the bootstrap.
    """
    ranked = sorted(others, key=lambda subject: (not subject.real, -subject.scores.mean))
    differences = []
    for subject in ranked:
        mean, low, high = paired_interval(composite, subject.scores, seed=seed)
        differences.append(Difference(other=subject.scores.subject, mean=mean, low=low, high=high))
    best = next(subject for subject in ranked if subject.role == "source").scores
    by_task = []
    for task in composite.tasks:
        mean, low, high = paired_interval(composite.on(task.task), best.on(task.task), seed=seed)
        by_task.append(TaskDifference(other=best.subject, task=task.task, mean=mean, low=low, high=high))
    evidence = Evidence(
        split=composite.split,
        subjects=(Subject(role="composite", scores=composite), *ranked),
        differences=tuple(differences),
        by_task=tuple(by_task),
        best_single=best.subject,
        verdict="",
        notes=notes,
        routing=routing or {},
        likelihoods=likelihoods,
    )
    return evidence.model_copy(update={"verdict": verdict_on(evidence)})
