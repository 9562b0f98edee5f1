"""The workbench a strategy works at: makes merges, scores checkpoints, reports progress."""

from dataclasses import dataclass, field
from pathlib import Path

from composer.artefacts import Store
from composer.errors import MergeError
from composer.evaluation.scores import Scorer
from composer.merging.mergekit_backend import make_merge
from composer.merging.plan import MergeStep
from composer.merging.smoke import smoke_check
from composer.progress import Progress, Step, silent
from composer.zoo import Checkpoint, Zoo


@dataclass
class Workbench:
    """What a strategy may use; it never sees files, tasks or the graph."""

    zoo: Zoo
    store: Store
    score: Scorer
    accept: str = "proxy"
    dtype: str | None = None
    seed: int = 0
    progress: Progress = silent
    made: dict[str, Checkpoint] = field(default_factory=dict)
    """Merged checkpoints of this cluster, by the name of their step."""

    def checkpoint(self, name: str) -> Checkpoint:
        """Return a member of the zoo or a merge made before."""
        return self.made[name] if name in self.made else self.zoo[name]

    def merge(self, step: MergeStep) -> Checkpoint:
        """Make a merge and check that it works.

        Raises:
            MergeError: if it cannot be made or fails the smoke check.
        """
        self.progress(Step(stage="merge", message=f"{step.operator}: {' + '.join(step.inputs)}"))
        inputs = [self.checkpoint(name) for name in step.inputs]
        merged = make_merge(step, inputs, self.zoo.base, self.store, dtype=self.dtype, seed=self.seed)
        # The check of an artefact is remembered beside it: content-addressed, so it cannot go stale.
        passed = self.store.path("smoke", Path(merged.path).name)
        if not passed.exists():
            broken = smoke_check(merged, inputs)
            if broken:
                raise MergeError(f"merge '{step.name}': {broken}")
            passed.parent.mkdir(parents=True, exist_ok=True)
            passed.touch()
        self.made[step.name] = merged
        return merged

    def mean_score(self, checkpoint: Checkpoint) -> float:
        """Return a checkpoint's mean proxy score."""
        self.progress(Step(stage="merge", message=f"scoring {checkpoint.id} on the proxy split"))
        return self.score(checkpoint).mean
