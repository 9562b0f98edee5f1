"""The judge: merges a candidate into a living model and scores it on proxy items.

One judge lives in each worker process and keeps what is dear: mapped inputs, masks, the model, tokenised items.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from composer.artefacts import Store, digest
from composer.errors import ComposerError, DiskFullError, EvaluationError, MergeError
from composer.evaluation.in_process import score_checkpoint
from composer.evaluation.live import LiveScorer
from composer.evaluation.scores import Scores
from composer.evaluation.settings import EvaluateSection
from composer.evaluation.tasks import Split, part_of, split_of
from composer.merging.engine.closeness import closeness
from composer.merging.engine.export import export
from composer.merging.engine.live import LiveModel, shape_of
from composer.merging.engine.merge import Merge
from composer.merging.engine.shelf import MappedStatistics, Shelf
from composer.merging.plan import MergeStep, Smoke
from composer.merging.smoke import smoke_check
from composer.probes import ProbesSection, load_texts, record_fisher, record_grams
from composer.value import Value
from composer.zoo import Checkpoint

Portion = dict[str, tuple[str, ...]]
"""Item hashes by task."""


class Bench(Value):
    """What every merge of a cluster has in common."""

    base: Checkpoint | None
    dtype: str | None = None
    seed: int = 0
    tokenizer: str = "union"
    texts: str | None = None
    """Hash of the probe texts."""


class Measured(Value):
    """What a candidate scored, or why it could not be scored."""

    scores: Scores | None
    failure: str | None = None
    merge_seconds: float = 0.0
    score_seconds: float = 0.0


@dataclass
class Judge:
    """Scores candidates and checkpoints on the proxy split."""

    evaluate: EvaluateSection
    probes: ProbesSection
    root: Path
    """The store's directory."""
    splits: dict[str, Split] = field(default_factory=dict)
    """Splits that have been loaded."""
    share: tuple[float, float] = (0.0, 1.0)
    """The part of the proxy items that count, where some are for something else."""
    _shelf: Shelf = field(init=False)
    _live: LiveModel | None = None
    _scorer: LiveScorer | None = None

    def __post_init__(self) -> None:
        self.store = Store(self.root)
        self._shelf = Shelf(self._statistics)

    def split(self, name: str) -> Split:
        """Return the items of a split; loaded once."""
        if name not in self.splits:
            whole = split_of(self.evaluate, name)
            self.splits[name] = part_of(whole, *self.share) if name == "proxy" and self.share != (0, 1) else whole
        return self.splits[name]

    def score(self, checkpoint: Checkpoint, split: str = "proxy") -> Scores:
        """Score a checkpoint, or return what it scored before.

        Raises:
            EvaluationError: if it cannot be loaded.
        """
        return score_checkpoint(checkpoint, self.split(split), self.store, batch_size=self.evaluate.batch_size)

    def observe(self, checkpoint: Checkpoint) -> None:
        """Keep what a predictor compares a model by; see `composer.simmerge.signals.observe`."""
        from composer.simmerge.signals import observe

        observe(checkpoint, self.split("proxy"), self.probes, self.store, batch_size=self.evaluate.batch_size)

    def trial(self, step: MergeStep, inputs: Sequence[Checkpoint], bench: Bench, portion: Portion | None) -> Measured:
        """Merge a candidate in memory and score it.

        Args:
            step: The candidate.
            inputs: Its inputs, in order.
            bench: What it has in common with others.
            portion: The items; by default the whole proxy split.

        Returns:
            Its scores; or the reason if it cannot be made or gives no finite numbers.
        """
        began = time.perf_counter()
        try:
            merge = self.merge(step, inputs, bench)
            model, scorer = self._model(merge)
            model.load(merge)
            merged = time.perf_counter()
            scores = scorer.score(step.name, portion)
        except DiskFullError:
            raise
        except (MergeError, EvaluationError) as error:
            return Measured(scores=None, failure=str(error))
        return Measured(scores=scores, merge_seconds=merged - began, score_seconds=time.perf_counter() - merged)

    def rate(self, step: MergeStep, inputs: Sequence[Checkpoint], bench: Bench, split: str) -> Measured:
        """Score a merge that is no candidate on a whole split, without writing it; what it scored before is kept.

        Arguments as of `trial`.

        Returns:
            Its scores, or the reason if it cannot be made or scored.
        """
        began = time.perf_counter()
        try:
            merge = self.merge(step, inputs, bench)
            items = self.split(split)
            known = self.store.path("scores", digest([merge.key, split, items.fingerprint]) + ".json")
            if known.is_file():
                return Measured(scores=Scores.load(known).model_copy(update={"subject": step.name}))
            self._live = self._scorer = None  # two models at a time may be too many
            live = LiveModel(merge, items.dtype)
            live.load(merge)
            merged = time.perf_counter()
            scores = LiveScorer(live.model, live.tokenizer, items, batch_size=self.evaluate.batch_size).score(step.name)
        except DiskFullError:
            raise
        except ComposerError as error:
            return Measured(scores=None, failure=str(error))
        scores.save(known)
        return Measured(scores=scores, merge_seconds=merged - began, score_seconds=time.perf_counter() - merged)

    def merge(self, step: MergeStep, inputs: Sequence[Checkpoint], bench: Bench) -> Merge:
        """Bind a step to its inputs.

        Raises:
            MergeError: if the operator does not fit them.
        """
        options = bench.model_dump(exclude={"base"})
        return Merge(step, inputs, bench.base, self._shelf, **options)

    def keep(self, step: MergeStep, inputs: Sequence[Checkpoint], bench: Bench, name: str) -> tuple[Checkpoint, Smoke]:
        """Write a candidate as a checkpoint called `name`, and look whether it works.

        Raises:
            MergeError: if it cannot be made.
            DiskFullError: if there is no room.
        """
        kept = export(self.merge(step, inputs, bench), name, self.store)
        return kept, smoke_check(kept, list(inputs), self.store)

    def closeness(
        self, step: MergeStep, inputs: Sequence[Checkpoint], bench: Bench, others: Sequence[Checkpoint]
    ) -> list[float]:
        """Return the similarity of a candidate to other checkpoints; see `composer.merging.engine.closeness`."""
        base = bench.base
        return closeness(self.merge(step, inputs, bench), others, base, self._shelf)

    def _model(self, merge: Merge) -> tuple[LiveModel, LiveScorer]:
        if self._live is None or self._scorer is None or self._live.shape != shape_of(merge):
            self._live = self._scorer = None  # two at a time may be too many
            self._live = LiveModel(merge, self.split("proxy").dtype)
            self._scorer = LiveScorer(
                self._live.model, self._live.tokenizer, self.split("proxy"), batch_size=self.evaluate.batch_size
            )
        return self._live, self._scorer

    def _statistics(self, kind: str, checkpoint: Checkpoint) -> MappedStatistics:
        record = record_fisher if kind == "fisher" else record_grams
        texts = load_texts(self.probes.texts, self.probes.limit, self.probes.characters)
        return MappedStatistics(record(checkpoint, texts, self.store))
