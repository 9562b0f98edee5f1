"""Strategies: which merges of a cluster are made, in which order, and which are kept."""

from typing import TYPE_CHECKING, Protocol

from composer.registry import Registry

if TYPE_CHECKING:
    from composer.clustering import Cluster
    from composer.merging.plan import MergeOutcome, MergePlan
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


STRATEGIES: Registry[Strategy] = Registry("strategy")
STRATEGIES.register("average", "composer.merging.strategies.greedy:average")
STRATEGIES.register("coefficient", "composer.merging.strategies.greedy:coefficient")
STRATEGIES.register("similarity", "composer.merging.strategies.greedy:similarity")
STRATEGIES.register("evolution", "composer.merging.strategies.evolution:strategy")
STRATEGIES.register("fixed", "composer.merging.strategies.fixed:strategy")
STRATEGIES.register("none", "composer.merging.strategies.none:strategy")
