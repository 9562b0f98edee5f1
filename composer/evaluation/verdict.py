"""The evidence in words: what intervals leave open is said to be open."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from composer.evaluation.evidence import Difference, Evidence, TaskDifference


def verdict_on(evidence: "Evidence") -> str:
    """Return whether the composite beats the best single model, where it loses, and how it stands beside references."""
    notes = [f"{note[0].upper()}{note[1:]}." for note in evidence.notes]
    parts = [_against_best(evidence), *_losses(evidence), _references(evidence), *notes]
    return " ".join(part for part in parts if part)


def _against_best(evidence: "Evidence") -> str:
    name = evidence.best_single
    gap = next(one for one in evidence.differences if one.other == name)
    mine, other = evidence.subjects[0].scores.mean, evidence.subject(name).scores.mean
    figures = f"{mine:.3f} against {other:.3f}, difference {_figures(gap)}"
    if gap.low > 0:
        return f"The composite beats the best single model, {name}: {figures}."
    if gap.high < 0:
        return f"The composite is worse than the best single model, {name}: {figures}."
    return f"The composite and the best single model, {name}, cannot be told apart: {figures}."


def _losses(evidence: "Evidence") -> list[str]:
    """Say on which tasks the best single model is ahead, surely or perhaps."""
    name = evidence.best_single
    lost = [one for one in evidence.by_task if one.high < 0]
    behind = [one for one in evidence.by_task if one.mean < 0 <= one.high]
    said = []
    if lost:
        said.append(f"It loses to {name} on {_each(lost)}.")
    if behind:
        said.append(f"It scores below {name}, within noise, on {_each(behind)}.")
    if not said and evidence.by_task:
        said.append(f"It scores below {name} on no task.")
    return said


def _references(evidence: "Evidence") -> str:
    """Say how the composite stands beside uniform averages, random routing and the best expert for each task."""
    gaps = {one.other: one for one in evidence.differences}
    said: dict[str, list[str]] = {"beats": [], "cannot be told from": [], "is behind": []}
    for subject in (one for one in evidence.subjects if not one.real):
        gap = gaps[subject.scores.subject]
        standing = "beats" if gap.low > 0 else "is behind" if gap.high < 0 else "cannot be told from"
        said[standing].append(f"{_NAMED[subject.role].format(gap.other)} ({_figures(gap)})")
    return " ".join(f"It {standing} {_listed(names)}." for standing, names in said.items() if names)


_NAMED = {
    "average": "the {}",
    "random": "random routing over its experts",
    "oracle": "the best expert for each task, chosen in hindsight",
}


def _figures(gap: "Difference | TaskDifference") -> str:
    return f"{gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"


def _each(gaps: "list[TaskDifference]") -> str:
    return _listed([f"{one.task} ({_figures(one)})" for one in gaps])


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
