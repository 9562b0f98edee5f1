"""The advisor: observes models once each and says which merges of them are worth making."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from composer.artefacts import Store
from composer.evaluation.tasks import Split
from composer.executors import Executor
from composer.merging.judge import Judge
from composer.merging.operators import OPERATORS
from composer.merging.plan import Advice, Forecast
from composer.merging.settings import MergeSection
from composer.probes import ProbesSection
from composer.progress import Progress, Step, silent
from composer.similarity.gate import difference
from composer.simmerge.arms import ARMS, Arm, arms_of
from composer.simmerge.bandit import context_of
from composer.simmerge.footprint import take_sample
from composer.simmerge.planner import Planner, Weighed
from composer.simmerge.predictor import SHIPPED, Predictor
from composer.simmerge.signals import gather
from composer.zoo import Checkpoint, make_whole

STRANGE = 0.05
"""Novelty from which a predictor still ranks merges, but does not refuse any. How often merges gain at all is another
thing for other models, and the first that is wrong for what is far from its training; those it was trained on are
below."""
SHOWN = 8
"""Forecasts that are kept of all that were weighed."""


@dataclass
class Advisor:
    """Predicts merges of models of one cluster."""

    base: Checkpoint | None
    split: Split
    """The proxy items; no other split is looked at."""
    probes: ProbesSection
    section: MergeSection
    store: Store
    executor: Callable[[], Executor[Judge]] | None = None
    """Gives what observes models, when that is first needed; by default this process does."""
    progress: Progress = silent
    weights: Mapping[str, float] = field(default_factory=dict)
    """How much tasks count; those that are not named count once."""

    def advise(self, models: Sequence[Checkpoint], including: str | None = None) -> Advice:
        """Weigh the merges of some models.

        Args:
            models: Two or more of one cluster.
            including: A model that must be among the sources.

        Raises:
            PredictorError: if there is no predictor for the features of this program.
            MergeError: if an operator cannot be predicted.
            ZooError: if a model cannot be observed.
        """
        began = time.monotonic()
        planner = self.planner(models)
        found = planner.search(self.arms(based=planner.signals.based), self.section.simmerge.most)
        if including is not None:
            place = planner.signals.ids.index(including)
            found = [one for one in found if place in one.sources]
        learns = self.section.strategy == "bandit"
        chosen: dict[object, Weighed] = {}
        for one in found:
            chosen.setdefault(one.arm.label if learns else (frozenset(one.sources), one.arm.operator), one)
        kept = list(chosen.values())[: None if learns else SHOWN]
        top = [forecast(one, planner.signals.ids, planner.tasks) for one in kept]
        if learns:
            contexts = [planner.features(one.sources, one.arm).values() for one in kept]
            top = [
                one.model_copy(update={"context": tuple(context_of([row[None] for row in rows])[0].tolist())})
                for one, rows in zip(top, contexts, strict=True)
            ]
        best = planner.signals.ids[planner.best]
        return Advice(
            best=best,
            reference=planner.reference,
            level=planner.level,
            weighed=planner.weighed,
            seconds=round(time.monotonic() - began, 3),
            forecasts=tuple(top),
            refused=self._refused(top, best, planner.weighed),
        )

    def _refused(self, top: Sequence[Forecast], best: str, weighed: int) -> str | None:
        if not top:
            return "none of the operators takes these models"
        first, risk = top[0], self.section.simmerge.risk
        if worth_trying(first, risk):
            return None
        return (
            f"the best of {weighed} merges, {first.label} of {', '.join(first.inputs)}, is predicted {first.gain:+.4f} "
            f"against {best}, and to gain at all with probability {first.chance:.2f}; merge.simmerge.risk asks for "
            f"{1 - risk:.2f}"
        )

    def planner(self, models: Sequence[Checkpoint]) -> Planner:
        """Observe models and return what weighs their merges."""
        own = self.section.simmerge
        # A zoo of several families has one base, which is of one of them.
        base = self.base if self.base is not None and difference(self.base, models[0]) is None else None
        everyone = [*models, *([base] if base else [])]
        for one in everyone:
            make_whole(one, self.store, self.progress)
        predictor = Predictor.unpack(Path(own.predictor) if own.predictor else SHIPPED)
        if self.executor is not None:
            calls = [(one,) for one in everyone]
            for done, _ in enumerate(self.executor().map("observe", calls), start=1):
                name = everyone[done - 1].id
                self.progress(Step(stage="plan", message=f"observed {name}", done=done, total=len(everyone)))
        signals = gather(models, base, self.split, self.probes, self.store, self.progress)
        return Planner(
            signals=signals,
            sample=take_sample(models, base),
            predictor=predictor,
            tasks=[items.name for items in self.split.tasks],
            labelled=own.labels,
            weights=self.weights,
        )

    def arms(self, *, based: bool) -> list[Arm]:
        """Return the ways of merging that are weighed: the recipe's operators, or by default all that are known.

        Args:
            based: Whether there is a base for task vectors.
        """
        given = self.section.operators or list(ARMS)
        return arms_of([name for name in given if based or OPERATORS.get(name).start != "base"])


def worth_trying(one: Forecast, risk: float) -> bool:
    """Return whether a merge is to be made: it is sure enough to gain, or too strange for a refusal."""
    return one.chance >= 1 - risk or one.novelty > STRANGE


def forecast(one: Weighed, ids: Sequence[str], tasks: Sequence[str]) -> Forecast:
    """Return a weighed merge by the names of its models."""
    return Forecast(
        operator=one.arm.operator,
        inputs=tuple(ids[place] for place in one.sources),
        parameters=one.arm.parameters(len(one.sources)),
        label=one.arm.label,
        gain=one.gain,
        low=one.low,
        high=one.high,
        chance=one.chance,
        by_task=dict(zip(tasks, one.by_task, strict=True)),
        novelty=one.novelty,
    )
