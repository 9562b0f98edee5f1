"""Uniform averages: what every cluster would score if all its members were merged with equal weights, unsearched."""

from collections.abc import Sequence

from composer.clustering import Cluster
from composer.evaluation.baselines import average_of
from composer.evaluation.scores import Scores
from composer.executors import Executor
from composer.merging.judge import Bench, Judge
from composer.merging.plan import MergeOutcome, MergeStep
from composer.merging.settings import MergeSection
from composer.zoo import Zoo

SAME = 1e-9
"""Weights that differ by less are equal: they are kept with twelve digits."""


def uniform_averages(
    clusters: Sequence[Cluster],
    kept: Sequence[MergeOutcome],
    zoo: Zoo,
    section: MergeSection,
    executor: Executor[Judge],
) -> tuple[list[Scores], tuple[str, ...]]:
    """Score the uniform average of each cluster of two or more on the held-out split; nothing is written but scores.

    Args:
        clusters: All clusters.
        kept: Outcomes whose results are experts that are scored anyway; one that is the average is not made again.
        zoo: The sources.
        section: The recipe's `merge`: averages are stored, and vocabularies brought together, as its merges are.
        executor: Merges and scores.

    Returns:
        Scores, each called `average_of` its cluster; and in words which average is missing, and why.
    """
    scores, notes = [], []
    bench = Bench(base=zoo.base, dtype=section.dtype, seed=section.seed, tokenizer=section.tokenizer)
    for cluster in clusters:
        if len(cluster.members) < 2:
            continue
        name = average_of(cluster.id)
        same = next((one.result for one in kept if one.cluster == cluster.id and is_average(one, cluster)), None)
        if same is not None:
            notes.append(f"the {name} is {same.id} itself")
            continue
        step = MergeStep(name=name, operator="linear", inputs=cluster.members, parameters={"weight": 1.0})
        [measured] = executor.map("rate", [(step, [zoo[one] for one in cluster.members], bench, "held_out")])
        if measured.scores is None:
            notes.append(f"the {name} cannot be made: {measured.failure}")
        else:
            scores.append(measured.scores)
    return scores, tuple(notes)


def is_average(outcome: MergeOutcome, cluster: Cluster) -> bool:
    """Return whether what was made of a cluster is the uniform average of all its members."""
    counted = {name: weight for name, weight in outcome.weights.items() if abs(weight) > SAME}
    share = 1 / len(cluster.members)
    return (
        outcome.result is not None
        and set(counted) == set(cluster.members)
        and all(abs(weight - share) < SAME for weight in counted.values())
    )
