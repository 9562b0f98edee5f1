"""The workbench a strategy works at: races candidates, keeps the ones that pay, reports progress."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from composer.errors import MergeError
from composer.evaluation.scores import Scores
from composer.evaluation.settings import Scorer
from composer.evaluation.statistics import Gain, paired_gain
from composer.executors import Executor
from composer.merging.cost import SearchCost
from composer.merging.judge import Bench, Judge, Measured, Portion
from composer.merging.plan import Advice, MergeOutcome, MergePlan, MergeStep, Smoke, Trial
from composer.merging.trials import TrialLog, joined, trial_key, within, without
from composer.progress import Progress, Step, silent
from composer.zoo import Checkpoint, Zoo

if TYPE_CHECKING:
    from composer.merging.settings import MergeSection

Advise = Callable[[Sequence[Checkpoint], str], Advice]
"""Says which merges of some checkpoints are worth making, of those that one of them is in."""

SHARES = (0.25, 0.5, 1.0)
"""Parts of the proxy items after which candidates that are clearly behind are dropped."""
CLEARLY = 2.0
"""Standard errors by which a candidate that is dropped is behind at least."""
MUCH = 0.25
"""Share of what a merge changes that rounding may blur before it is worth saying."""
LEAST_ITEMS = 4
"""Items a task must have in a part; of fewer no standard error can be taken."""


@dataclass(frozen=True)
class Standing:
    """A candidate after a race."""

    step: MergeStep
    measured: Measured
    scores: Scores | None
    """What it scored on the items up to where it was dropped; None if it failed."""
    complete: bool
    """Whether it was scored on all items; if not, it failed or was dropped."""


@dataclass
class Workbench:
    """What a strategy may use; it never sees files, tasks or the graph."""

    zoo: Zoo
    cluster: str
    section: "MergeSection"
    executor: Executor[Judge]
    log: TrialLog
    proxy: Portion
    """All proxy items."""
    fingerprint: str
    """Hash of the proxy items and their tasks."""
    texts: str | None = None
    """Hash of the probe texts."""
    scorer: Scorer = "torch"
    """What scores candidates and what they are compared with; see `composer.evaluation.scorer.choose`."""
    weights: dict[str, float] = field(default_factory=dict)
    """How much tasks count; those that are not named count once."""
    advise: Advise | None = None
    """Predicts merges of some checkpoints, where there is a predictor."""
    memory: Path | None = None
    """Where strategies that learn keep what they learnt, from run to run."""
    progress: Progress = silent
    made: dict[str, Checkpoint] = field(default_factory=dict)
    """Merged checkpoints of this cluster, by the name of their step."""
    smokes: dict[str, Smoke] = field(default_factory=dict)
    """Their checks."""
    _raced: set[str] = field(default_factory=set)
    """Keys of all candidates, those that the log knew before too."""
    _scored: set[str] = field(default_factory=set)
    """Content hashes of checkpoints that were scored besides."""
    _written: dict[str, int] = field(default_factory=dict)
    """Bytes of weights by the path they were written to."""

    @property
    def bench(self) -> Bench:
        """What every merge of the cluster has in common."""
        section = self.section
        shared = {"dtype": section.dtype, "seed": section.seed, "tokenizer": section.tokenizer}
        return Bench(base=self.zoo.base, texts=self.texts, scorer=self.scorer, **shared)

    def checkpoint(self, name: str) -> Checkpoint:
        """Return a member of the zoo or a merge made before."""
        return self.made[name] if name in self.made else self.zoo[name]

    def inputs(self, step: MergeStep) -> list[Checkpoint]:
        """Return the checkpoints of a step, in order."""
        return [self.checkpoint(name) for name in step.inputs]

    def scores(self, names: Sequence[str]) -> dict[str, Scores]:
        """Score members or merges made before on the proxy split."""
        found = {}
        calls = [(self.checkpoint(name), "proxy", self.scorer) for name in names]
        for name, scores in zip(names, self.executor.map("score", calls), strict=True):
            found[name] = scores
            self._scored.add(self.checkpoint(name).content_hash)
            message = f"{name}: {scores.mean:.4f} on the proxy split"
            self.progress(Step(stage="merge", message=message, done=len(found), total=len(names)))
        return found

    def race(self, steps: Sequence[MergeStep], best: Scores, message: str) -> list[Standing]:
        """Merge candidates in memory and score them, dropping those that are clearly behind on the way.

        All are scored on a first part of the items, those that are left on a second, and so on; after each part a
        candidate is dropped if it is behind the leader, another candidate or `best`, by more than `CLEARLY` standard
        errors of the paired difference. So the result does not depend on the order in which candidates are scored.

        Args:
            steps: The candidates.
            best: What they have to beat, scored on all items.
            message: What is going on, for the progress bar.
        """
        known = [self._known(step) for step in steps]
        self._raced |= {self._key(step) for step in steps}
        alive = [index for index, one in enumerate(known) if one is None or one.failure is None]
        reached: dict[int, Scores] = {}
        for share in self._shares():
            part = {name: items[: max(1, round(share * len(items)))] for name, items in self.proxy.items()}
            self._measure(
                [index for index in alive if without(part, _scores(known[index]))], steps, known, part, message
            )
            # The log may know more of a candidate than it is its turn to be judged by.
            standing = {index: within(part, scores) for index in alive if (scores := _scores(known[index])) is not None}
            reached |= standing
            leader = max([best, *standing.values()], key=lambda one: paired_gain(one, best).mean)
            last = share == 1
            alive = [i for i, one in standing.items() if last or not paired_gain(one, leader).behind(CLEARLY)]
        return [
            Standing(step, one or Measured(scores=None), reached.get(index), complete=index in alive)
            for index, (step, one) in enumerate(zip(steps, known, strict=True))
        ]

    def _measure(
        self,
        chosen: list[int],
        steps: Sequence[MergeStep],
        known: list[Measured | None],
        part: Portion,
        message: str,
    ) -> None:
        """Score chosen candidates on what they have not been scored on of a part."""
        calls = [
            (steps[index], self.inputs(steps[index]), self.bench, without(part, _scores(known[index])))
            for index in chosen
        ]
        for done, (index, measured) in enumerate(zip(chosen, self.executor.map("trial", calls), strict=True), start=1):
            known[index] = now = joined(known[index], measured)
            self.log.put(self._key(steps[index]), self.cluster, steps[index], now)
            self.progress(Step(stage="merge", message=message, done=done, total=len(chosen)))

    def _shares(self) -> tuple[float, ...]:
        if not self.section.early_stopping:
            return (1.0,)
        fewest = min(len(items) for items in self.proxy.values())
        return tuple(share for share in SHARES if share == 1 or share * fewest >= LEAST_ITEMS)

    def _known(self, step: MergeStep) -> Measured | None:
        """Return what the log knows of a candidate; tasks may have counted otherwise then."""
        found = self.log.get(self._key(step))
        if found is None or found.scores is None:
            return found
        return found.model_copy(update={"scores": found.scores.weighted(self.weights)})

    def _key(self, step: MergeStep) -> str:
        return trial_key(step, self.inputs(step), self.bench, self.fingerprint)

    def keep(self, step: MergeStep) -> Checkpoint:
        """Write a candidate as a checkpoint and check that it works.

        Raises:
            MergeError: if it cannot be made or fails the smoke check.
            DiskFullError: if there is no room.
        """
        self.progress(Step(stage="merge", message=f"writing {step.name}: {step.operator}({', '.join(step.inputs)})"))
        [(kept, smoke)] = self.executor.map("keep", [(step, self.inputs(step), self.bench, step.name)])
        self._written[kept.path] = kept.size_bytes
        if smoke.problem:
            raise MergeError(f"merge '{step.name}': {smoke.problem}")
        self.made[step.name], self.smokes[step.name] = kept, smoke
        if warning := rounding_warning(kept):
            self.progress(Step(stage="merge", message=warning))
        return self.made[step.name]

    def closeness(self, step: MergeStep, names: Sequence[str]) -> dict[str, float]:
        """Return how similar a candidate is to members, measured on its weights as they come."""
        others = [self.checkpoint(name) for name in names]
        [values] = self.executor.map("closeness", [(step, self.inputs(step), self.bench, others)])
        return dict(zip(names, values, strict=True))

    def outcome(
        self,
        plan: MergePlan,
        trials: Sequence[Trial],
        result: MergeStep | None = None,
        sources: tuple[str, ...] = (),
        weights: dict[str, float] | None = None,
    ) -> MergeOutcome:
        """Return what became of a cluster.

        Args:
            plan: The plan for it.
            trials: What was decided.
            result: The merge that was kept as its model, if one was.
            sources: Members that went into it.
            weights: What each of them counts in it, where it is a weighted sum.
        """
        return MergeOutcome(
            cluster=plan.cluster,
            result=self.made[result.name] if result else None,
            merged=sources,
            whole=tuple(name for name in plan.members if name not in sources),
            trials=tuple(trials),
            weights=weights or {},
            smoke=self.smokes[result.name] if result else None,
        )

    def cost(self) -> SearchCost:
        """Return what was spent here so far."""
        spent = self.log.cost(self._raced)
        written = {"kept": len(self._written), "written_bytes": sum(self._written.values())}
        return spent.model_copy(update={"models": len(self._scored), **written})

    def pays(self, gain: Gain) -> bool:
        """Return whether a gain is enough for a merge to be kept."""
        return self.section.accept == "always" or gain.beyond(self.section.margin)

    def lost(self, step: MergeStep, scores: Scores) -> str | None:
        """Return in words the first protected task on which a candidate is behind one of its inputs, or None.

        Inputs that are merges themselves passed the same test, so nothing is lost against the sources either.
        """
        if not self.section.protect:
            return None
        inputs = self.scores(step.inputs)
        for task in self.section.protect:
            for name, own in inputs.items():
                gain = paired_gain(scores.on(task), own.on(task)).mean
                if gain < 0:
                    return f"protected task {task} would drop by {-gain:.4f} below {name}"
        return None


def rounding_warning(merged: Checkpoint) -> str | None:
    """Return what to say of a merge that its storage type is too coarse for."""
    rounding = merged.lineage.rounding if merged.lineage else None
    if rounding is None or rounding < MUCH:
        return None
    finer = "float16" if merged.dtype == "BF16" else "float32"
    cost = "at the same size" if finer == "float16" else "at twice the size"
    return (
        f"{merged.id}: rounding to {merged.dtype} changes {rounding:.0%} as much as the merge itself; "
        f"merge.dtype: {finer} keeps it {cost}"
    )


def _scores(measured: Measured | None) -> Scores | None:
    return measured.scores if measured is not None else None
