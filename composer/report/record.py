"""Everything a report tells, in one value."""

from typing import Any

from composer.clustering import Join
from composer.evaluation import Evidence
from composer.merging.cost import SearchCost
from composer.merging.plan import MergeOutcome
from composer.mixture import Composite
from composer.planning import Plan
from composer.serving.server import Endpoint
from composer.serving.vitals import Vitals
from composer.similarity import SimilarityMatrix
from composer.value import Value
from composer.zoo import Zoo


class RunRecord(Value):
    """A finished run."""

    run: str
    recipe: dict[str, Any]
    zoo: Zoo
    similarity: SimilarityMatrix
    joins: tuple[Join, ...]
    """How the models join as the threshold falls."""
    plan: Plan
    outcomes: tuple[MergeOutcome, ...]
    composite: Composite
    endpoint: Endpoint
    evidence: Evidence
    seconds: dict[str, float]
    """Duration of each stage."""
    cost: SearchCost = SearchCost()
    """What the search for merges took; each outcome has its own share."""
    scoring: dict[str, float] = {}
    """Seconds that scoring held-out items took, by what was scored."""
    vitals: Vitals | None = None
    """What serving takes; None if it was not measured."""
