"""What a run would do and cost, without a run.

Door: `preview`.
"""

from composer.artefacts import Store
from composer.planning import Plan
from composer.progress import Progress, silent
from composer.recipe import Recipe
from composer.zoo.checkpoint import Zoo


def preview(recipe: Recipe, store: Store, progress: Progress = silent) -> tuple[Plan, Zoo]:
    """Describe, compare, cluster and plan; nothing is made but what the store remembers.

    Raises:
        ComposerError: as the stages of a run up to the plan.
    """
    from composer.clustering import cluster
    from composer.evaluation.tasks import split_of
    from composer.planning import make_plan
    from composer.similarity import compare
    from composer.simmerge import Advisor
    from composer.zoo import inspect_zoo

    proxy = split_of(recipe.evaluate, "proxy")  # what is wrong with a task is told before any weights are read
    zoo = inspect_zoo(recipe.zoo, store, progress)
    skip = recipe.zoo.on_error == "skip"
    matrix = compare(zoo, store, recipe.cluster, recipe.probes, skip_broken=skip, progress=progress)
    zoo = zoo.without(matrix.skipped)
    weights = recipe.evaluate.weights
    advisor = Advisor(zoo.base, proxy, recipe.probes, recipe.merge, store, progress=progress, weights=weights)
    plan = make_plan(
        recipe,
        zoo,
        cluster(matrix, recipe.cluster),
        proxy_items=proxy.size,
        held_out_items=split_of(recipe.evaluate, "held_out").size,
        advise=advisor.advise,
    )
    return plan, zoo
