"""A contextual bandit over ways of merging: it takes every merge that was scored as feedback, and keeps what it learnt.

It models what the offline predictor gets wrong: linear in a merge's features, plus an intercept of each operator and of
each arm (an operator with its parameters), all with a Gaussian prior. So it begins where the predictor is, what one arm
teaches serves the others, and an operator or a task that the predictor never saw is tried until it is known what it is
worth. Merges are chosen by LinUCB (Li and others 2010, arXiv 1003.0146, their hybrid model) or by Thompson sampling
(Agrawal and Goyal 2013, arXiv 1209.3352).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from filelock import FileLock
from pydantic import ValidationError

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
PRIOR = 0.05
"""Prior variance of each coefficient and intercept, in usual errors squared."""
NOISE = 2.0
"""Variance of what is measured, in usual errors squared: scores come from few items. Both were chosen on the training
zoos, where disjoint models of each arm had more regret."""
REMEMBERED = 1000
"""Merges that are learnt from, the latest: what is believed costs the third power of them."""


class Observation(Value):
    """One merge that was scored."""

    label: str
    """Its arm; the first word is the operator."""
    context: tuple[float, ...]
    """`[context]`."""
    error: float
    """How much more was gained than the predictor saw, in score."""


class Bandit(Value):
    """What was learnt from merges that were scored."""

    version: int = VERSION
    observations: tuple[Observation, ...] = ()
    seen: frozenset[str] = frozenset()
    """Merges it was taught, which it is not taught twice."""

    def choose(
        self,
        labels: Sequence[str],
        contexts: "Array",
        predicted: "Array",
        *,
        policy: Policy = "linucb",
        exploration: float = 0.3,
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
        mean, covariance = self._believed(labels, contexts)
        if policy == "thompson":
            wide = exploration**2 * covariance + 1e-9 * np.eye(len(mean))
            values = np.random.default_rng(seed).multivariate_normal(mean, wide, method="cholesky")
        else:
            values = mean + exploration * np.sqrt(np.maximum(np.diag(covariance), 0.0))
        return int((predicted / SCALE + values).argmax())

    def learnt(self, label: str, context: "Array", predicted: float, gain: float) -> "Bandit":
        """Return what is known after one more merge was scored.

        Args:
            label: Its arm.
            context: `[context]`.
            predicted: The gain the offline predictor saw.
            gain: The one that was measured.
        """
        one = Observation(label=label, context=tuple(context.tolist()), error=gain - predicted)
        return self.model_copy(update={"observations": (*self.observations, one)[-REMEMBERED:]})

    def _believed(self, labels: Sequence[str], contexts: "Array") -> "tuple[Array, Array]":
        """Return mean and covariance of the predictor's errors, in usual errors (Bayesian linear regression)."""
        prior = _kernel(labels, contexts, labels, contexts)
        if not self.observations:
            return np.zeros(len(labels)), prior
        known = [one.label for one in self.observations]
        place = np.array([one.context for one in self.observations])
        own = _kernel(known, place, known, place) + NOISE * np.eye(len(known))
        shared = _kernel(labels, contexts, known, place)
        solved = np.linalg.solve(own, np.column_stack([[one.error / SCALE for one in self.observations], shared.T]))
        return shared @ solved[:, 0], prior - shared @ solved[:, 1:]


def _kernel(labels: Sequence[str], contexts: "Array", others: Sequence[str], other_contexts: "Array") -> "Array":
    """Return prior covariances of merges: of coefficients, plus where operator, and where arm, are the same."""
    arms, operators = (
        np.equal.outer(np.array(own, dtype=object), np.array(other, dtype=object)).astype(float)
        for own, other in ((labels, others), ([one.split()[0] for one in labels], [one.split()[0] for one in others]))
    )
    found: Array = PRIOR * (contexts @ other_contexts.T + arms + operators)
    return found


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
    """Return what was learnt in earlier runs; nothing, if there were none or another version of this wrote it."""
    if not path.is_file():
        return Bandit()
    try:
        found = Bandit.load(path)
    except ValidationError:
        return Bandit()
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
