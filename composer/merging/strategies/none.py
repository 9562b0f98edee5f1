"""Strategy `none`: every model stays whole."""

from composer.clustering import Cluster
from composer.merging.plan import MergeOutcome, MergePlan
from composer.merging.settings import MergeSection
from composer.merging.workbench import Workbench


class NoMerging:
    """Keeps every member as it is."""

    def plan(self, cluster: Cluster, section: MergeSection) -> MergePlan:
        """Plan nothing."""
        intent = "a single model: nothing to merge" if len(cluster.members) == 1 else "kept whole, as the recipe says"
        return MergePlan(cluster=cluster.id, strategy="none", members=cluster.members, intent=intent)

    def carry_out(self, plan: MergePlan, workbench: Workbench) -> MergeOutcome:
        """Return the members as they are."""
        return MergeOutcome(cluster=plan.cluster, result=None, whole=plan.members)


strategy = NoMerging()
