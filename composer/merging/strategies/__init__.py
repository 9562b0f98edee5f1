"""Strategies: which merges of a cluster are made, in which order, and which are kept."""

from typing import TYPE_CHECKING, Protocol

from composer.registry import Registry

if TYPE_CHECKING:
    from composer.clustering import Cluster
    from composer.merging.plan import MergeOutcome, MergePlan, MergeStep
    from composer.merging.workbench import Workbench


class Strategy(Protocol):
    """A way of turning a cluster into one model."""

    def plan(self, cluster: "Cluster", steps: "tuple[MergeStep, ...]", judged: bool) -> "MergePlan":
        """Say what would be done, and at most how much of it; nothing is made.

        Args:
            cluster: What may be merged.
            steps: The merges that the recipe lists, for strategies that take a list.
            judged: Whether merges must hold on the proxy split to be kept.
        """
        ...

    def carry_out(self, plan: "MergePlan", workbench: "Workbench") -> "MergeOutcome":
        """Do it.

        Raises:
            MergeError: if nothing can be merged at all.
        """
        ...


STRATEGIES: Registry[Strategy] = Registry("strategy")
STRATEGIES.register("average", "composer.merging.strategies.average:strategy")
STRATEGIES.register("fixed", "composer.merging.strategies.fixed:strategy")
STRATEGIES.register("none", "composer.merging.strategies.none:strategy")
