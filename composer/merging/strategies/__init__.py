"""Strategies: which merges of a cluster are made, in which order, and which are kept."""

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from composer.registry import Registry

if TYPE_CHECKING:
    from composer.clustering import Cluster
    from composer.merging.plan import Advice, MergeOutcome, MergePlan
    from composer.merging.settings import MergeSection
    from composer.merging.workbench import Workbench


class Strategy(Protocol):
    """A way of turning a cluster into one model."""

    def plan(self, cluster: "Cluster", section: "MergeSection") -> "MergePlan":
        """Say what would be done, and at most how much of it; nothing is made.

        Args:
            cluster: What may be merged.
            section: The recipe's `merge`.

        Raises:
            MergeError: if the recipe asks for what cannot be done.
        """
        ...

    def carry_out(self, plan: "MergePlan", workbench: "Workbench") -> "MergeOutcome":
        """Do it.

        Raises:
            MergeError: if nothing can be merged at all.
        """
        ...


@runtime_checkable
class Foresighted(Strategy, Protocol):
    """A strategy whose plan goes by what merges are predicted to score."""

    def foresee(self, plan: "MergePlan", advice: "Advice", section: "MergeSection") -> "MergePlan":
        """Return the plan with what the predictor makes of the cluster."""
        ...


STRATEGIES: Registry[Strategy] = Registry("strategy")
STRATEGIES.register("average", "composer.merging.strategies.greedy:average")
STRATEGIES.register("coefficient", "composer.merging.strategies.greedy:coefficient")
STRATEGIES.register("similarity", "composer.merging.strategies.greedy:similarity")
STRATEGIES.register("evolution", "composer.merging.strategies.evolution:strategy")
STRATEGIES.register("simmerge", "composer.simmerge.strategy:strategy")
STRATEGIES.register("bandit", "composer.simmerge.strategy:bandit")
STRATEGIES.register("fixed", "composer.merging.strategies.fixed:strategy")
STRATEGIES.register("none", "composer.merging.strategies.none:strategy")
