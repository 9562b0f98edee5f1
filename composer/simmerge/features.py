"""The features of a merge that was not made: what its sources and its coefficients say about it, for one task.

A merge is given by its effective coefficients, how much of each source's difference from the origin is in it. With
more than two sources, the strongest one on the task stands against the blend of the others, so a predictor that was
trained on pairs reads any number. All features are free of scale: cosines, shares, ratios, scores.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from composer.evaluation.answers import AnswerTable
from composer.simmerge.signals import BANDS, Signals

if TYPE_CHECKING:
    from composer.simmerge.signals import Array

VERSION = 1
"""Changes when features do; a predictor trained on others is refused."""
TINY = 1e-12
PLACES = ("attention", "mlp", "early", "middle", "late")
CURVE = 2.0
"""What a model does moves less than in proportion to small coefficients: answers are imagined with coefficients to this
power too."""


@dataclass(frozen=True)
class Feature:
    """One feature."""

    summary: str
    unit: str
    group: str


def _table(group: str, unit: str, rows: dict[str, str]) -> dict[str, Feature]:
    return {name: Feature(summary, unit, group) for name, summary in rows.items()}


FEATURES: dict[str, Feature] = {
    **_table("merge", "coefficient", {
        "part_strong": "effective coefficient of the strongest source",
        "part_others": "sum of the others' effective coefficients",
    }),
    **_table("merge", "ratio", {
        "residual": "length of what the operator adds outside the sources' span, over the length of the merge's change",
    }),
    **_table("merge", "log2", {"sources": "number of sources"}),
    **_table("weights", "cosine", {
        "cosine": "between the differences of the strongest and the others from the origin",
        "cosine_attention": "the same in attention",
        "cosine_mlp": "the same in MLPs",
        "cosine_early": "the same in the first third of layers",
        "cosine_middle": "the same in the middle third",
        "cosine_late": "the same in the last third",
    }),
    **_table("weights", "share", {
        "signs": "share of weights whose differences have one sign",
        "energy_strong": "of the strongest's difference that lies in four directions of each matrix (of a sample)",
        "energy_others": "the same of the others",
        "overlap": "how far these directions are the same in the strongest and the others",
    }),
    **_table("weights", "log2", {"length_ratio": "length of the others' difference over the strongest's"}),
    **_table("weights", "log10", {
        "length": "length of the strongest's difference over the origin's norm",
        "length_merged": "length of the merge's change over the strongest's difference",
    }),
    **_table("plain", "log10", {
        "drift_strong": "squared length of the strongest's change in behaviour on plain texts, nats",
        "drift_others": "the same of the others",
        "drift_merged": "the same of the merge, by algebra",
    }),
    **_table("plain", "cosine", {"drift_cosine": "between the changes of the strongest and the others in behaviour"}),
    **_table("plain", "share", {"agreement": "positions at which strongest and others find one token likeliest"}),
    **_table("plain", "CKA", {"alignment": "of hidden states of the strongest and the others"}),
    **_table("task", "log10", {
        "task_drift_strong": "as drift_strong, on the task's prompts",
        "task_drift_others": "as drift_others, on the task's prompts",
        "task_drift_merged": "as drift_merged, on the task's prompts",
        "focus_strong": "task_drift_strong less drift_strong: how much the strongest is about this task",
        "focus_others": "the same of the others",
    }),
    **_table("task", "cosine", {"task_cosine": "as drift_cosine, on the task's prompts"}),
    **_table("task", "share", {"task_agreement": "as agreement, on the task's prompts"}),
    **_table("task", "nats", {
        "entropy_strong": "mean entropy of the strongest less the origin's, on the task's prompts",
        "entropy_others": "the same of the others",
        "jensen": "how far below the sources' mean divergence from the origin that of the merge is, by algebra",
    }),
    **_table("answers", "probability", {
        "sure_origin": "mean probability of the likeliest choice, of the origin",
        "sure_strong": "the same of the strongest",
        "sure_others": "the same of the others",
        "sure_merged": "the same of the merge as imagined from the sources' log-likelihoods",
        "sure_merged_curved": "the same, coefficients squared",
    }),
    **_table("answers", "share", {
        "same_strong_others": "items that the strongest and the others answer alike",
        "same_strong_origin": "items that the strongest and the origin answer alike",
        "same_strong_merged": "items that the strongest and the imagined merge answer alike",
        "same_strong_curved": "the same, coefficients squared",
    }),
    **_table("scores", "score", {
        "score_strong": "of the strongest on the proxy items, expected value of the metric",
        "behind_origin": "the strongest's less the origin's",
        "behind_others": "the strongest's less the best of the others'",
        "imagined": "of the imagined merge less the strongest's",
        "imagined_curved": "the same, coefficients squared",
        "imagined_hard": "as imagined, by the metric itself",
        "imagined_hard_curved": "the same, coefficients squared",
    }),
    **_table("scores", "0 or 1", {"chooses": "whether the task has choices"}),
}  # fmt: skip
NAMES = tuple(FEATURES)
LABELLED = tuple(name for name, one in FEATURES.items() if one.group == "scores" and name != "chooses")
"""Features that take labels; a predictor does without them too."""


def merge_features(
    signals: Signals, task: str, parts: "Array", residual: "Array", *, labelled: bool = True
) -> "tuple[Array, NDArrayInt]":
    """Return the features of some merges for one task, and the number of each one's strongest source.

    Args:
        signals: What is known of the models.
        task: The task's name.
        parts: Effective coefficients, `[merges, models]`; 0 for what is no source.
        residual: What each merge has outside its sources' span, `[merges]`; nan where it is not known.
        labelled: Whether labels of proxy items may be used.

    Returns:
        `[merges, features]` in the order of `NAMES`, nan where something is not known; and `[merges]`.
    """
    merges = len(parts)
    inside = np.abs(parts) > TINY
    manners, table = signals.tasks[task], signals.answers.get(task)
    strength = _strength(signals, task, labelled)
    strong = np.where(inside, strength, -np.inf).argmax(axis=1)
    rows = np.arange(merges)
    part_strong = parts[rows, strong]
    others = parts.copy()
    others[rows, strong] = 0.0
    part_others = others.sum(axis=1)
    # What the others would be alone, as one model.
    alone = others / np.where(np.abs(part_others) > TINY, part_others, 1.0)[:, None]
    one = np.eye(len(signals.ids))[strong]
    found: dict[str, Array] = {
        "part_strong": part_strong,
        "part_others": part_others,
        "residual": residual,
        "sources": np.log2(np.maximum(inside.sum(axis=1), 1)),
    }
    found |= _of_weights(signals, parts, one, alone)
    plain = _of_behaviour(signals.plain.gram, parts, one, alone)
    own = _of_behaviour(manners.gram, parts, one, alone)
    found |= plain | {f"task_{name}": value for name, value in own.items() if name != "drift_cosine"}
    found["task_cosine"] = own["drift_cosine"]
    found["focus_strong"] = own["drift_strong"] - plain["drift_strong"]
    found["focus_others"] = own["drift_others"] - plain["drift_others"]
    found["agreement"] = _mixed(signals.plain.agreement, strong, others)
    found["alignment"] = _mixed(signals.plain.alignment, strong, others)
    found["signs"] = _mixed(signals.signs, strong, others)
    found["overlap"] = _mixed(signals.overlap, strong, others)
    found["energy_strong"] = signals.energy[strong]
    found["energy_others"] = np.abs(alone) @ signals.energy / np.maximum(np.abs(alone).sum(axis=1), TINY)
    found["task_agreement"] = _mixed(manners.agreement, strong, others)
    found["entropy_strong"] = manners.entropy[strong]
    found["entropy_others"] = alone @ manners.entropy
    found["jensen"] = parts @ np.diag(manners.gram) - _squared(manners.gram, parts)
    if table is not None:
        found |= _of_answers(table, parts, one, alone)
        if labelled:
            found |= _of_scores(signals, task, table, parts, strong, inside)
    found["chooses"] = np.full(merges, float(table is not None and table.chooses))
    missing = np.full(merges, np.nan)
    return np.stack([found.get(name, missing) for name in NAMES], axis=1), strong


if TYPE_CHECKING:
    from numpy.typing import NDArray

    NDArrayInt = NDArray[np.intp]


def _strength(signals: Signals, task: str, labelled: bool) -> "Array":
    """Return what models are ranked by: their score on the task, or without labels how far it has moved them."""
    table = signals.answers.get(task)
    if labelled and table is not None:
        found: Array = table.expected(table.likelihoods[1:]).mean(axis=-1)
        return found
    moved: Array = np.diag(signals.tasks[task].gram) / np.maximum(np.diag(signals.plain.gram), TINY)
    return moved


def _dots(gram: "Array", first: "Array", second: "Array") -> "Array":
    """Return inner products of pairs of blends, `[merges]`."""
    found: Array = ((first @ gram) * second).sum(axis=1)
    return found


def _squared(gram: "Array", vectors: "Array") -> "Array":
    return np.maximum(_dots(gram, vectors, vectors), 0.0)


def _cosine(gram: "Array", first: "Array", second: "Array") -> "Array":
    lengths = np.sqrt(_squared(gram, first) * _squared(gram, second))
    dots = _dots(gram, first, second)
    found: Array = np.where(lengths > TINY**2, np.clip(dots / np.maximum(lengths, TINY**2), -1, 1), np.nan)
    return found


def _log10(value: "Array") -> "Array":
    found: Array = np.log10(np.maximum(value, TINY))
    return found


def _of_weights(signals: Signals, parts: "Array", one: "Array", alone: "Array") -> "dict[str, Array]":
    def band(word: str) -> "Array":
        found: Array = signals.weights[[place for place, name in enumerate(BANDS) if word in name]].sum(axis=0)
        return found

    whole = signals.weights.sum(axis=0)
    length = np.sqrt(_squared(whole, one))
    return {
        "cosine": _cosine(whole, one, alone),
        **{
            f"cosine_{word}": _cosine(band(word), one, alone)
            for word in ("attention", "mlp", "early", "middle", "late")
        },
        "length_ratio": np.log2(np.maximum(np.sqrt(_squared(whole, alone)), TINY) / np.maximum(length, TINY)),
        "length": _log10(length / max(signals.size, TINY)),
        "length_merged": _log10(np.sqrt(_squared(whole, parts)) / np.maximum(length, TINY)),
    }


def _of_behaviour(gram: "Array", parts: "Array", one: "Array", alone: "Array") -> "dict[str, Array]":
    return {
        "drift_strong": _log10(_squared(gram, one)),
        "drift_others": _log10(_squared(gram, alone)),
        "drift_merged": _log10(_squared(gram, parts)),
        "drift_cosine": _cosine(gram, one, alone),
    }


def _mixed(pairs: "Array", strong: "NDArrayInt", others: "Array") -> "Array":
    """Return what holds between the strongest and each other, weighted by the others' coefficients."""
    weights = np.abs(others)
    total = weights.sum(axis=1)
    found: Array = (weights * np.nan_to_num(pairs[strong])).sum(axis=1) / np.where(total > TINY, total, np.nan)
    return found


def imagine(table: AnswerTable, parts: "Array") -> "Array":
    """Return the log-likelihoods of merges, were a model linear in its weights, `[merges, items, choices]`."""
    whole = np.concatenate([1 - parts.sum(axis=1, keepdims=True), parts], axis=1)
    found: Array = np.tensordot(whole, table.likelihoods, axes=1)
    return found


def curved(parts: "Array") -> "Array":
    """Return coefficients to the power of `CURVE`, with their signs."""
    found: Array = np.sign(parts) * np.abs(parts) ** CURVE
    return found


def _of_answers(table: AnswerTable, parts: "Array", one: "Array", alone: "Array") -> "dict[str, Array]":
    if not table.chooses:
        return {}
    origin = imagine(table, np.zeros((1, parts.shape[1])))
    each = {"origin": origin, "strong": imagine(table, one), "others": imagine(table, alone)}
    each |= {"merged": imagine(table, parts), "curved": imagine(table, curved(parts))}
    chosen = {name: (value / table.lengths).argmax(axis=-1) for name, value in each.items()}
    sure: Callable[[str], Array] = lambda name: table.chances(each[name]).max(axis=-1).mean(axis=-1)  # noqa: E731
    same: Callable[[str], Array] = lambda name: (chosen["strong"] == chosen[name]).mean(axis=-1)  # noqa: E731
    return {
        "sure_origin": np.repeat(sure("origin"), len(parts)),
        "sure_strong": sure("strong"),
        "sure_others": sure("others"),
        "sure_merged": sure("merged"),
        "sure_merged_curved": sure("curved"),
        "same_strong_others": same("others"),
        "same_strong_origin": same("origin"),
        "same_strong_merged": same("merged"),
        "same_strong_curved": same("curved"),
    }


def _of_scores(
    signals: Signals, task: str, table: AnswerTable, parts: "Array", strong: "NDArrayInt", inside: "NDArray[np.bool_]"
) -> "dict[str, Array]":
    expected = table.expected(table.likelihoods).mean(axis=-1)
    hard = signals.scores(task)
    own = expected[1:][strong]
    rest = np.where(inside, expected[1:], -np.inf)
    rest[np.arange(len(parts)), strong] = -np.inf
    best = rest.max(axis=1)
    straight, bent = imagine(table, parts), imagine(table, curved(parts))
    return {
        "score_strong": own,
        "behind_origin": own - expected[0],
        "behind_others": np.where(np.isfinite(best), own - best, np.nan),
        "imagined": table.expected(straight).mean(axis=-1) - own,
        "imagined_curved": table.expected(bent).mean(axis=-1) - own,
        "imagined_hard": table.score(straight).mean(axis=-1) - hard[1:][strong],
        "imagined_hard_curved": table.score(bent).mean(axis=-1) - hard[1:][strong],
    }
