"""What merges share: mapped weights and statistics, aligned vocabularies, what is remembered between trials."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from composer.artefacts import digest
from composer.errors import MergeError
from composer.merging.engine.memo import Memo
from composer.merging.engine.vocabulary import Vocabulary, align_vocabularies
from composer.zoo import Checkpoint, MappedWeights

if TYPE_CHECKING:
    import torch

Statistics = Callable[[str, Checkpoint], "MappedStatistics"]


class MappedStatistics:
    """What was recorded of a model on the probe texts, tensor by tensor, mapped."""

    def __init__(self, directory: Path) -> None:
        self._weights = MappedWeights(directory)
        index = directory / "index.json"
        self._names: dict[str, str] = (
            json.loads(index.read_text()) if index.is_file() else {name: name for name in self._weights.headers}
        )

    def flat(self, name: str) -> "torch.Tensor | None":
        """Return what is known of a weight, flat, or None."""
        return self._weights.flat(self._names[name]) if name in self._names else None

    def release(self, name: str) -> None:
        """Give the pages back."""
        if name in self._names:
            self._weights.release(self._names[name])


def no_statistics(kind: str, checkpoint: Checkpoint) -> MappedStatistics:
    """Refuse: there is nobody to record them."""
    raise MergeError(f"'{checkpoint.id}': no {kind} statistics at hand")


@dataclass
class Shelf:
    """What merges share: mapped weights, and what is remembered from trial to trial."""

    statistics: Statistics = no_statistics
    memo: Memo = field(default_factory=Memo)
    _weights: dict[str, MappedWeights] = field(default_factory=dict)
    _statistics: dict[tuple[str, str], MappedStatistics] = field(default_factory=dict)
    _vocabularies: dict[str, Vocabulary] = field(default_factory=dict)

    def weights(self, checkpoint: Checkpoint) -> MappedWeights:
        """Return a checkpoint's weights, mapped."""
        if checkpoint.content_hash not in self._weights:
            self._weights[checkpoint.content_hash] = MappedWeights(Path(checkpoint.path))
        return self._weights[checkpoint.content_hash]

    def statistic(self, kind: str, checkpoint: Checkpoint) -> MappedStatistics:
        """Return what was recorded of a checkpoint on the probe texts."""
        key = kind, checkpoint.content_hash
        if key not in self._statistics:
            self._statistics[key] = self.statistics(kind, checkpoint)
        return self._statistics[key]

    def vocabulary(self, source: str, donor: Checkpoint, models: Sequence[Checkpoint]) -> Vocabulary:
        """Return how the vocabularies of some models are brought together."""
        key = digest([source, donor.content_hash, [one.content_hash for one in models]])
        if key not in self._vocabularies:
            self._vocabularies[key] = align_vocabularies(source, donor, models)
        return self._vocabularies[key]
