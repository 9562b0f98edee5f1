"""The merge stage of one cluster."""

from composer.errors import DiskFullError, MergeError
from composer.merging.plan import MergeOutcome, MergePlan
from composer.merging.strategies import STRATEGIES
from composer.merging.workbench import Workbench


def merge_cluster(plan: MergePlan, workbench: Workbench) -> MergeOutcome:
    """Carry out the plan for one cluster.

    A cluster that cannot be merged is not lost: the outcome says why, and all its members stay whole.

    Raises:
        DiskFullError: if the disk fills up; that stops the run, since every branch would fail.
    """
    strategy = STRATEGIES.get(plan.strategy)
    try:
        outcome = strategy.carry_out(plan, workbench)
    except DiskFullError:
        raise
    except MergeError as error:
        outcome = MergeOutcome(cluster=plan.cluster, result=None, whole=plan.members, failure=str(error))
    return outcome.model_copy(update={"cost": workbench.cost()})
