"""The planner: which models of a cluster to merge, by which arm and in which order, with none of the merges made."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, permutations
from typing import TYPE_CHECKING

import numpy as np

from composer.errors import MergeError
from composer.merging.operators import OPERATORS
from composer.merging.plan import MergeStep
from composer.merging.strategies.growth import flat_weights
from composer.simmerge.arms import Arm
from composer.simmerge.features import merge_features
from composer.simmerge.footprint import Sample, footprint
from composer.simmerge.predictor import Prediction, Predictor
from composer.simmerge.signals import Signals

if TYPE_CHECKING:
    from composer.simmerge.signals import Array

EXACT = 6
"""Models up to which every subset is weighed."""
BEAM = 8
"""Subsets that are carried on, beyond that."""
LARGEST = 10
"""Sources of a merge, at most, in a beam search that no other bound is given for."""
PATIENCE = 2
"""Sizes without a better merge after which a search ends."""
FINALISTS = 6
"""Subsets that are weighed by every arm after a beam search."""
ORDERED = 4
"""Sources up to which every order is weighed, where order makes a difference; beyond, the best model first."""


@dataclass(frozen=True)
class Weighed:
    """A merge that was not made."""

    sources: tuple[int, ...]
    """Numbers of the models, in order."""
    arm: Arm
    gain: float
    """Predicted mean over tasks, less that of the best single model."""
    low: float
    """Lower bound of the gain."""
    high: float
    chance: float
    """Probability that the gain is above zero."""
    by_task: tuple[float, ...]
    """Predicted score on each task."""
    novelty: float
    """How far it is from what the predictor was trained on, 0..1."""


@dataclass
class Planner:
    """Weighs merges of some models."""

    signals: Signals
    sample: Sample
    predictor: Predictor
    tasks: Sequence[str]
    weights: Mapping[str, float] = field(default_factory=dict)
    """How much tasks count in means over them; those that are not named count once."""
    level: float = 0.8
    """Share of merges whose gain lies within its interval."""
    labelled: bool = True
    """Whether labels of proxy items may be used."""
    weighed: int = 0
    """Merges weighed so far."""
    _footprints: dict[tuple[str, tuple[int, ...]], tuple["Array", float] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        nothing = np.zeros(len(self.signals.ids))
        found = [self.signals.levels(task) if self.labelled else nothing for task in self.tasks]
        self._levels = np.stack(found, axis=1)
        """`[models, tasks]`."""
        counts = np.array([self.weights.get(task, 1.0) for task in self.tasks])
        self._counts = counts / counts.mean()
        """How much each task counts, 1 on average, `[tasks]`."""
        self.best = int(self._mean(self._levels).argmax())
        """The best single model."""

    @property
    def reference(self) -> float:
        """What the best single model is expected to score, mean over tasks."""
        return float(self._mean(self._levels).max())

    def _mean(self, values: "Array") -> "Array":
        """Return the mean over tasks, `[rows]`, of values, `[rows, tasks]`."""
        found: Array = (values * self._counts).mean(axis=1)
        return found

    def search(self, arms: Sequence[Arm], most: int | None = None) -> list[Weighed]:
        """Return merges, the best first.

        Up to `EXACT` models every subset is weighed by every arm. Beyond, subsets grow in a beam search by the arms
        whose coefficients are known without a sample, the best model first, and the best of them are weighed by every
        arm in every order.

        Args:
            arms: Ways of merging.
            most: Sources of a merge, at most.
        """
        count = len(self.signals.ids)
        most = min(count, most or (count if count <= EXACT else LARGEST))
        if count <= EXACT:
            subsets = [one for size in range(2, most + 1) for one in combinations(range(count), size)]
            return self._sorted(self.weigh(self._plans(subsets, arms)))
        plain = [arm for arm in arms if OPERATORS.get(arm.operator).linear] or list(arms)
        found: dict[tuple[int, ...], Weighed] = {}
        beam: list[tuple[int, ...]] = list(combinations(range(count), 2))
        stale, top = 0, -np.inf
        while beam and stale < PATIENCE:
            for one in self.weigh(self._plans(beam, plain, orders=False)):
                subset = tuple(sorted(one.sources))
                if subset not in found or one.gain > found[subset].gain:
                    found[subset] = one
            size = len(beam[0])
            best = sorted((found[subset] for subset in beam if subset in found), key=lambda one: -one.gain)[:BEAM]
            stale, top = (0, best[0].gain) if best and best[0].gain > top else (stale + 1, top)
            if size == most:
                break
            grown = {
                tuple(sorted((*one.sources, other)))
                for one in best
                for other in range(count)
                if other not in one.sources
            }
            beam = sorted(grown)
        finalists = sorted(found, key=lambda subset: -found[subset].gain)[:FINALISTS]
        rest = [one for subset, one in found.items() if subset not in finalists]
        return self._sorted([*rest, *self.weigh(self._plans(finalists, arms))])

    def weigh(self, plans: Iterable[tuple[tuple[int, ...], Arm]]) -> list[Weighed]:
        """Predict some merges; those that an operator refuses are left out."""
        made = [(sources, arm, found) for sources, arm in plans if (found := self._footprint(sources, arm)) is not None]
        if not made:
            return []
        parts, residual = np.zeros((len(made), len(self.signals.ids))), np.zeros(len(made))
        for number, (sources, _, found) in enumerate(made):
            parts[number, list(sources)], residual[number] = found
        return self._predict([(sources, arm) for sources, arm, _ in made], parts, residual)

    def features(self, sources: tuple[int, ...], arm: Arm) -> dict[str, "Array"]:
        """Return the features of one merge, by task.

        Raises:
            MergeError: if the operator refuses it.
        """
        own = self._footprint(sources, arm)
        if own is None:
            raise MergeError(f"operator '{arm.operator}' does not take these models")
        parts = np.zeros((1, len(self.signals.ids)))
        parts[0, list(sources)] = own[0]
        rest = np.array([own[1]])
        return {
            task: merge_features(self.signals, task, parts, rest, labelled=self.labelled)[0][0] for task in self.tasks
        }

    def _predict(self, plans: list[tuple[tuple[int, ...], Arm]], parts: "Array", residual: "Array") -> list[Weighed]:
        each, base = [], []
        for place, task in enumerate(self.tasks):
            features, strong = merge_features(self.signals, task, parts, residual, labelled=self.labelled)
            each.append(features)
            base.append(self._levels[strong, place])
        prediction = self.predictor.predict(each)
        counted = Prediction(prediction.gain * self._counts, prediction.scale * self._counts)
        scores = np.stack(base, axis=1) + prediction.gain
        middle, low, high = self.predictor.mean_interval(counted, self.level)
        gain = self._mean(scores) - self.reference
        chance = self.predictor.chance(gain, counted)
        novelty = np.mean([self.predictor.novelty(one) for one in each], axis=0)
        self.weighed += len(plans)
        return [
            Weighed(
                sources=sources,
                arm=arm,
                gain=float(gain[n]),
                low=float(gain[n] + low[n] - middle[n]),
                high=float(gain[n] + high[n] - middle[n]),
                chance=float(chance[n]),
                by_task=tuple(map(float, scores[n])),
                novelty=float(novelty[n]),
            )
            for n, (sources, arm) in enumerate(plans)
        ]

    def _plans(
        self, subsets: Iterable[tuple[int, ...]], arms: Sequence[Arm], *, orders: bool = True
    ) -> list[tuple[tuple[int, ...], Arm]]:
        """Return the subsets with each arm that takes all of a subset at once, in all orders that differ or one."""
        found = []
        ranking = np.argsort(-self._mean(self._levels), kind="stable").tolist()
        for subset in subsets:
            for arm in arms:
                most = OPERATORS.get(arm.operator).most
                if most is not None and len(subset) > most:
                    continue
                first = tuple(one for one in ranking if one in subset)
                differ = orders and arm.ordered and len(subset) <= ORDERED
                found += [(order, arm) for order in (permutations(first) if differ else [first])]
        return found

    def _footprint(self, sources: tuple[int, ...], arm: Arm) -> "tuple[Array, float] | None":
        key = (arm.label, sources)
        if key not in self._footprints:
            try:
                self._footprints[key] = _known(sources, arm, based=self.signals.based) or footprint(
                    arm.operator, arm.parameters(len(sources)), sources, self.sample
                )
            except MergeError:
                self._footprints[key] = None
        return self._footprints[key]

    @staticmethod
    def _sorted(found: list[Weighed]) -> list[Weighed]:
        return sorted(found, key=lambda one: (-one.gain, one.sources, one.arm.label))


def _known(sources: tuple[int, ...], arm: Arm, *, based: bool) -> "tuple[Array, float] | None":
    """Return the footprint of a weighted sum, which needs no sample; None for what is none.

    Raises:
        MergeError: if the operator does not take these inputs.
    """
    operator = OPERATORS.get(arm.operator)
    if operator.linear and operator.start == "base" and not based:
        raise MergeError(f"operator '{arm.operator}' works on task vectors; set zoo.base in the recipe")
    names = tuple(map(str, sources))
    step = MergeStep(name="sum", operator=arm.operator, inputs=names, parameters=arm.parameters(len(sources)))
    flat = flat_weights(step, {}, None)
    return (np.array([flat[name] for name in names]), 0.0) if flat else None
