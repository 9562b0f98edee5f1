"""The values of the merge stage: what is planned, what was tried, what came out."""

from composer.merging.cost import SearchCost
from composer.value import Value
from composer.zoo.checkpoint import Checkpoint


class MergeStep(Value):
    """One merge: an operator over named inputs."""

    name: str
    operator: str
    inputs: tuple[str, ...]
    """Ids of members, or names of earlier steps, in order."""
    parameters: dict[str, float | bool | list[float | list[float]]] = {}
    """A list gives one value per input, or per group of layers; what is missing takes the operator's default."""


class Forecast(Value):
    """What a merge that was not made is predicted to score."""

    operator: str
    inputs: tuple[str, ...]
    """Ids, in order."""
    parameters: dict[str, float | bool | list[float | list[float]]] = {}
    label: str
    """Operator and setting in words."""
    gain: float
    """Mean over tasks, less that of the best single model."""
    low: float
    """Lower bound of the gain."""
    high: float
    """Upper bound of the gain."""
    chance: float
    """Probability that there is a gain at all."""
    by_task: dict[str, float]
    """Score on each task."""
    novelty: float
    """How far the merge is from what the predictor was trained on, 0..1."""
    context: tuple[float, ...] = ()
    """What a bandit knows it by."""


class Advice(Value):
    """What a predictor makes of a cluster."""

    best: str
    """The best single model."""
    reference: float
    """What it is expected to score, mean over tasks."""
    level: float
    """Share of merges whose gain lies within its interval."""
    weighed: int
    """Merges that were weighed."""
    seconds: float
    """What that took, with what had to be observed of the models."""
    forecasts: tuple[Forecast, ...]
    """The best of them, the best first; never two of the same models by the same operator, or for a bandit, never two
    by the same arm."""
    refused: str | None = None
    """Why none of them should be made, or None."""


class MergePlan(Value):
    """What a strategy intends for one cluster."""

    cluster: str
    strategy: str
    members: tuple[str, ...]
    operators: tuple[str, ...] = ()
    """What a search tries, one after another."""
    steps: tuple[MergeStep, ...] = ()
    """The merges that are already decided; a search decides on the way and leaves this empty."""
    trials: int = 0
    """At most this many candidates will be merged in memory and scored on the proxy split."""
    merges: int = 0
    """At most this many merges will be written."""
    evaluations: int = 0
    """At most this many checkpoints will be scored on the proxy split besides."""
    advice: Advice | None = None
    """What the plan goes by, where merges are predicted."""
    intent: str
    """The plan in one sentence."""


class Trial(Value):
    """One decision: the best candidate of a round, and whether it was kept."""

    step: MergeStep
    score: float | None
    """Mean proxy score of the candidate; None if none could be scored."""
    reference: float | None
    """The proxy score it had to beat."""
    gain: float | None = None
    """Mean paired difference to it."""
    error: float | None = None
    """Standard error of the gain."""
    tried: int = 1
    """Candidates of the round: one operator and set of inputs with several parameters."""
    stopped: int = 0
    """How many of them were dropped before they had been scored on all items."""
    failed: int = 0
    """How many of them could not be made or gave no finite numbers."""
    accepted: bool
    reason: str


class Smoke(Value):
    """Whether a merged checkpoint is a working language model at all."""

    problem: str | None
    """What is wrong with it, or None."""
    perplexity: float | None = None
    """exp of the mean next-token loss on a few plain texts."""
    inputs: dict[str, float] = {}
    """The same of its inputs."""
    sample: str = ""
    """A short greedy continuation of a plain text."""


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
    """What each source (and the base) counts in the result, where it is a weighted sum of them."""
    smoke: Smoke | None = None
    """The check of the result."""
    failure: str | None = None
    """Why the cluster could not be merged at all."""
    cost: SearchCost = SearchCost()
    """What that took."""
