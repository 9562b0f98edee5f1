"""The values of the merge stage: what is planned, what was tried, what came out."""

from composer.value import Value
from composer.zoo.checkpoint import Checkpoint


class MergeStep(Value):
    """One merge: an operator over named inputs."""

    name: str
    operator: str
    inputs: tuple[str, ...]
    """Ids of members, or names of earlier steps, in order."""
    parameters: dict[str, float | bool | list[float]] = {}
    """A list gives one value per input. What is missing takes the operator's default."""


class MergePlan(Value):
    """What a strategy intends for one cluster."""

    cluster: str
    strategy: str
    members: tuple[str, ...]
    steps: tuple[MergeStep, ...] = ()
    """The merges that are already decided; a greedy strategy decides on the way and leaves this empty."""
    merges: int = 0
    """At most this many merges will be made."""
    evaluations: int = 0
    """At most this many checkpoints will be scored on the proxy split."""
    intent: str
    """The plan in one sentence."""


class Trial(Value):
    """One merge that was made and judged."""

    step: MergeStep
    score: float | None
    """Mean proxy score of the merge; None if it failed the smoke check or was not scored."""
    reference: float | None
    """The proxy score it had to hold."""
    accepted: bool
    reason: str


class MergeOutcome(Value):
    """What became of a cluster."""

    cluster: str
    result: Checkpoint | None
    """The merged model, or None if nothing was merged."""
    merged: tuple[str, ...] = ()
    """Members that went into the result."""
    whole: tuple[str, ...]
    """Members that stay whole."""
    trials: tuple[Trial, ...] = ()
    weights: dict[str, float] = {}
    """The share of each member in the result, where the operators are linear."""
    failure: str | None = None
    """Why the cluster could not be merged at all."""
