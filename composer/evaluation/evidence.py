"""Evidence: what the composite gained, against every model it came from."""

from typing import Literal

from composer.evaluation.scores import Scores
from composer.evaluation.statistics import paired_interval
from composer.value import Value

Role = Literal["composite", "merged", "source", "base"]


class Subject(Value):
    """One row of the evidence table."""

    role: Role
    scores: Scores


class Difference(Value):
    """Composite minus another subject, on the mean over tasks, with a 95 % paired bootstrap interval."""

    other: str
    mean: float
    low: float
    high: float


class Evidence(Value):
    """Held-out scores of the composite and everything it is compared with."""

    split: str
    subjects: tuple[Subject, ...]
    """The composite first, then the others by falling mean."""
    differences: tuple[Difference, ...]
    best_single: str
    """The source model with the highest held-out mean: the baseline that is hardest to beat."""
    verdict: str
    """The result in words."""
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
    routing: dict[str, dict[str, int]] | None = None,
    likelihoods: str = "endpoint",
    seed: int = 0,
) -> Evidence:
    """Compare the composite with all others, item by item.

    Args:
        composite: The composite's held-out scores.
        others: Every source model; merged models and the base where there are any.
        routing: How many items each expert answered, by task.
        likelihoods: Where the composite's likelihoods were computed.
        seed: Seed of the bootstrap.
    """
    ranked = sorted(others, key=lambda subject: -subject.scores.mean)
    differences = []
    for subject in ranked:
        mean, low, high = paired_interval(composite, subject.scores, seed=seed)
        differences.append(Difference(other=subject.scores.subject, mean=mean, low=low, high=high))
    best = next(subject for subject in ranked if subject.role == "source")
    gap = next(one for one in differences if one.other == best.scores.subject)
    return Evidence(
        split=composite.split,
        subjects=(Subject(role="composite", scores=composite), *ranked),
        differences=tuple(differences),
        best_single=best.scores.subject,
        verdict=_verdict(composite, best.scores, gap),
        routing=routing or {},
        likelihoods=likelihoods,
    )


def _verdict(composite: Scores, best: Scores, gap: Difference) -> str:
    name = best.subject
    figures = (
        f"{composite.mean:.3f} against {best.mean:.3f}, difference {gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"
    )
    if gap.low > 0:
        text = f"The composite beats the best single model, {name}: {figures}."
    elif gap.high < 0:
        text = f"The composite is worse than the best single model, {name}: {figures}."
    else:
        text = f"The composite and the best single model, {name}, cannot be told apart: {figures}."
    losses = [task.task for task in composite.tasks if task.mean < best.task(task.task).mean]
    return f"{text} It scores below {name} on {', '.join(losses)}." if losses else text
