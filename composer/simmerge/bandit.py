"""A contextual bandit over ways of merging: it takes every merge that was scored as feedback, and keeps what it learnt.

One linear model per arm of what the offline predictor gets wrong (disjoint LinUCB; Li and others 2010, arXiv
1003.0146; or Thompson sampling; Agrawal and Goyal 2013, arXiv 1209.3352). So it begins where the predictor is, and
an operator or a task that the predictor never saw is tried until it is known what it is worth.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from filelock import FileLock

from composer.simmerge.features import NAMES, VERSION
from composer.value import Value

if TYPE_CHECKING:
    from composer.simmerge.signals import Array

Policy = Literal["linucb", "thompson"]

CONTEXT = (
    "part_strong",
    "part_others",
    "residual",
    "cosine",
    "length_ratio",
    "drift_cosine",
    "task_cosine",
    "imagined",
    "imagined_curved",
    "behind_others",
)
"""Features that errors are linear in, mean over tasks."""
SCALE = 0.05
"""A usual error of the predictor, in score: rewards are measured in it."""
RIDGE = 4.0
"""Precision of the prior, in observations: how much is believed to be wrong before anything was seen."""


class ArmState(Value):
    """What is known of one arm: a ridge regression."""

    precision: tuple[tuple[float, ...], ...]
    """`[context, context]`."""
    response: tuple[float, ...]
    """`[context]`: sum of contexts times rewards."""
    count: int


class Bandit(Value):
    """What was learnt from merges that were scored."""

    version: int = VERSION
    arms: dict[str, ArmState] = {}
    """By the arm's label."""
    seen: frozenset[str] = frozenset()
    """Merges it was taught, which it is not taught twice."""

    def choose(
        self,
        labels: Sequence[str],
        contexts: "Array",
        predicted: "Array",
        *,
        policy: Policy = "linucb",
        exploration: float = 1.0,
        seed: int = 0,
    ) -> int:
        """Return the number of the merge to make next.

        Args:
            labels: The arm of each merge on offer.
            contexts: `[merges, context]`, from `context_of`.
            predicted: `[merges]`: the gain that the offline predictor sees; zeros to learn from nothing.
            policy: "linucb" adds standard errors to what is expected, "thompson" draws from what is believed.
            exploration: Standard errors that are added, or that a draw is wide.
            seed: Of a draw.
        """
        generator = np.random.default_rng(seed)
        values = np.empty(len(labels))
        for label in sorted(set(labels)):
            places = [place for place, one in enumerate(labels) if one == label]
            precision, response = self._state(label, contexts.shape[1])
            inverse = np.linalg.inv(precision)
            own, mean = contexts[places], inverse @ response
            if policy == "thompson":
                drawn = generator.multivariate_normal(mean, exploration**2 * inverse, method="cholesky")
                values[places] = own @ drawn
            else:
                spread = np.sqrt(np.einsum("pi,ij,pj->p", own, inverse, own))
                values[places] = own @ mean + exploration * spread
        return int((predicted / SCALE + values).argmax())

    def learnt(self, label: str, context: "Array", predicted: float, gain: float) -> "Bandit":
        """Return what is known after one more merge was scored.

        Args:
            label: Its arm.
            context: `[context]`.
            predicted: The gain the offline predictor saw.
            gain: The one that was measured.
        """
        precision, response = self._state(label, len(context))
        state = ArmState(
            precision=tuple(map(tuple, (precision + np.outer(context, context)).tolist())),
            response=tuple((response + context * (gain - predicted) / SCALE).tolist()),
            count=(self.arms[label].count if label in self.arms else 0) + 1,
        )
        return self.model_copy(update={"arms": {**self.arms, label: state}})

    def _state(self, label: str, width: int) -> "tuple[Array, Array]":
        if label not in self.arms:
            return RIDGE * np.eye(width), np.zeros(width)
        own = self.arms[label]
        return np.array(own.precision), np.array(own.response)


def context_of(features: Sequence["Array"]) -> "Array":
    """Return what a merge is known by, `[merges, context]`: a constant and the mean of some features over tasks.

    Args:
        features: `[merges, features]` for each task; what is not known anywhere counts as 0.
    """
    places = [NAMES.index(name) for name in CONTEXT]
    stacked = np.stack([one[:, places] for one in features])
    known = np.isfinite(stacked)
    mean = np.where(known, stacked, 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    return np.concatenate([np.ones((len(mean), 1)), np.clip(mean, -2, 2)], axis=1)


def load_bandit(path: Path) -> Bandit:
    """Return what was learnt in earlier runs; nothing, if there were none or features were others then."""
    if not path.is_file():
        return Bandit()
    found = Bandit.load(path)
    return found if found.version == VERSION else Bandit()


def teach(path: Path, key: str, label: str, context: "Array", predicted: float, gain: float) -> Bandit:
    """Add one merge to what is kept in a file, which several runs may share; one with a key it knows is not added.

    Raises:
        DiskFullError: if there is no room.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        known = load_bandit(path)
        if key not in known.seen:
            known = known.learnt(label, context, predicted, gain)
            known = known.model_copy(update={"seen": known.seen | {key}})
            known.save(path)
    return known
