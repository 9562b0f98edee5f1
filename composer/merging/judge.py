"""The judge: merges a candidate into a living model and scores it on proxy items.

One judge lives in each worker process and keeps what is dear: mapped inputs, masks, the model, tokenised items.
"""

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from composer.artefacts import Store, digest
from composer.errors import ComposerError, DiskFullError, EvaluationError, MergeError
from composer.evaluation.in_process import known_scores, score_checkpoint
from composer.evaluation.live import LiveScorer
from composer.evaluation.scores import Scores
from composer.evaluation.settings import EvaluateSection, Scorer
from composer.evaluation.tasks import Split, part_of, split_of
from composer.merging.engine.closeness import closeness
from composer.merging.engine.export import export
from composer.merging.engine.live import LiveModel, shape_of
from composer.merging.engine.merge import Merge
from composer.merging.engine.shelf import MappedStatistics, Shelf
from composer.merging.engine.swapped import SwappedModel
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
    scorer: Scorer = "torch"
    """What scores candidates."""


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
    _swapped: SwappedModel | None = None

    def __post_init__(self) -> None:
        self.store = Store(self.root)
        self._shelf = Shelf(self._statistics)

    def split(self, name: str) -> Split:
        """Return the items of a split; loaded once."""
        if name not in self.splits:
            whole = split_of(self.evaluate, name)
            self.splits[name] = part_of(whole, *self.share) if name == "proxy" and self.share != (0, 1) else whole
        return self.splits[name]

    def score(self, checkpoint: Checkpoint, split: str = "proxy", scorer: Scorer = "torch") -> Scores:
        """Score a checkpoint, or return what it scored before; by vLLM on the proxy split only.

        Raises:
            EvaluationError: if it cannot be loaded.
            ServeError: if a vLLM engine dies or cannot take it.
        """
        items, weights = self.split(split), self.evaluate.weights
        if scorer == "torch":
            scores = score_checkpoint(checkpoint, items, self.store, batch_size=self.evaluate.batch_size)
            return scores.weighted(weights)
        known = known_scores(checkpoint, items, self.store, scorer)
        if not known.is_file():
            self._engine().take(checkpoint).score(checkpoint.id).save(known)
        return Scores.load(known).model_copy(update={"subject": checkpoint.id}).weighted(weights)

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

        Raises:
            DiskFullError: if there is no room.
            ServeError: if a vLLM engine dies or cannot take the model.
        """
        began = time.perf_counter()
        try:
            merge = self.merge(step, inputs, bench)
            scorer = self._load(merge, bench.scorer)
            merged = time.perf_counter()
            scores = scorer.score(step.name, portion)
        except DiskFullError:
            raise
        except (MergeError, EvaluationError) as error:
            return Measured(scores=None, failure=str(error))
        weighted = scores.weighted(self.evaluate.weights)
        return Measured(scores=weighted, merge_seconds=merged - began, score_seconds=time.perf_counter() - merged)

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
                scores = Scores.load(known).model_copy(update={"subject": step.name})
                return Measured(scores=scores.weighted(self.evaluate.weights))
            self.close()  # two models at a time may be too many
            live = LiveModel(merge, items.dtype)
            live.load(merge)
            merged = time.perf_counter()
            scores = LiveScorer(live.model, live.tokenizer, items, batch_size=self.evaluate.batch_size).score(step.name)
        except DiskFullError:
            raise
        except ComposerError as error:
            return Measured(scores=None, failure=str(error))
        scores.save(known)
        weighted = scores.weighted(self.evaluate.weights)
        return Measured(scores=weighted, merge_seconds=merged - began, score_seconds=time.perf_counter() - merged)

    def merge(self, step: MergeStep, inputs: Sequence[Checkpoint], bench: Bench) -> Merge:
        """Bind a step to its inputs.

        Raises:
            MergeError: if the operator does not fit them.
        """
        options = bench.model_dump(exclude={"base", "scorer"})
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

    def close(self) -> None:
        """Let go of models and engines; what is asked for next makes its own."""
        self._live = self._scorer = None
        if self._swapped is not None:
            self._swapped.close()
            self._swapped = None

    def _load(self, merge: Merge, scorer: Scorer) -> LiveScorer:
        """Merge into what is kept for that; return what scores it."""
        if scorer == "vllm":
            return self._engine().load(merge)
        model, found = self._model(merge)
        model.load(merge)
        return found

    def _engine(self) -> SwappedModel:
        if self._swapped is None:
            self.close()  # two models at a time may be too many
            log = self.root / f"scorer-{socket.gethostname()}-{os.getpid()}.log"
            self._swapped = SwappedModel(self.split("proxy"), log)
        return self._swapped

    def _model(self, merge: Merge) -> tuple[LiveModel, LiveScorer]:
        if self._live is None or self._scorer is None or self._live.shape != shape_of(merge):
            self.close()  # two at a time may be too many
            self._live = LiveModel(merge, self.split("proxy").dtype)
            self._scorer = LiveScorer(
                self._live.model, self._live.tokenizer, self.split("proxy"), batch_size=self.evaluate.batch_size
            )
        return self._live, self._scorer

    def _statistics(self, kind: str, checkpoint: Checkpoint) -> MappedStatistics:
        record = record_fisher if kind == "fisher" else record_grams
        texts = load_texts(self.probes.texts, self.probes.limit, self.probes.characters)
        return MappedStatistics(record(checkpoint, texts, self.store))
