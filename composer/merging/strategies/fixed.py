"""Strategy `fixed`: the merges that the recipe lists, in its order."""

from composer.clustering import Cluster
from composer.errors import MergeError
from composer.merging.plan import MergeOutcome, MergePlan, MergeStep, Trial
from composer.merging.settings import MergeSection
from composer.merging.strategies.greedy import decide
from composer.merging.strategies.growth import flat_weights
from composer.merging.workbench import Workbench


class FixedMerges:
    """Makes the listed merges; the last one that stands represents the cluster."""

    def plan(self, cluster: Cluster, section: MergeSection) -> MergePlan:
        """Plan the recipe's merges whose models are all in this cluster.

        Raises:
            MergeError: if a merge mixes models of this cluster with others.
        """
        inside = set(cluster.members)
        planned = []
        for step in section.steps:
            ours = [name for name in step.inputs if name in inside]
            if not ours:
                continue
            foreign = [name for name in step.inputs if name not in inside]
            if foreign:
                raise MergeError(
                    f"merge '{step.name}' joins '{ours[0]}' and '{foreign[0]}', which are not in one cluster; "
                    "they cannot be averaged (see the clusters in the plan)"
                )
            inside.add(step.name)
            planned.append(step)
        judged = bool(planned) and section.accept == "proxy"
        return MergePlan(
            cluster=cluster.id,
            strategy="fixed",
            members=cluster.members,
            steps=tuple(planned),
            trials=len(planned) if judged else 0,
            merges=len(planned),
            evaluations=len(cluster.members) if judged else 0,
            intent=_intent(planned),
        )

    def carry_out(self, plan: MergePlan, workbench: Workbench) -> MergeOutcome:
        """Make the merges; under `accept: proxy` one that does not beat its best source is not kept."""
        trials: list[Trial] = []
        sources: dict[str, tuple[str, ...]] = {name: (name,) for name in plan.members}
        base = workbench.zoo.base.id if workbench.zoo.base else None
        weights: dict[str, dict[str, float]] = {}
        result: MergeStep | None = None
        for place, step in enumerate(plan.steps):
            sources[step.name] = tuple(dict.fromkeys(source for name in step.inputs for source in sources[name]))
            trial = self._judge(step, sources[step.name], workbench)
            needed = any(step.name in later.inputs for later in plan.steps[place + 1 :])
            if trial.accepted or needed:
                try:
                    workbench.keep(step)
                except MergeError as error:
                    trials.append(trial.model_copy(update={"accepted": False, "reason": str(error)}))
                    break  # later merges may need this one
            weights[step.name] = flat_weights(step, weights, base)
            trials.append(trial)
            if trial.accepted:
                result = step
        if result is None:
            return workbench.outcome(plan, trials)
        return workbench.outcome(plan, trials, result, sources[result.name], weights[result.name])

    def _judge(self, step: MergeStep, sources: tuple[str, ...], workbench: Workbench) -> Trial:
        if workbench.section.accept == "always":
            return Trial(step=step, score=None, reference=None, accepted=True, reason="the recipe accepts it unseen")
        parents = workbench.scores(sources)
        best = max(parents, key=lambda name: parents[name].mean)
        standings = workbench.race([step], parents[best], f"{step.operator}: {', '.join(step.inputs)}")
        return decide(standings, parents[best], workbench, f"against its best source, {best}")[0]


def _intent(steps: list[MergeStep]) -> str:
    if not steps:
        return "kept whole: the recipe lists no merge of these"
    return "; ".join(f"{step.name} = {step.operator}({', '.join(step.inputs)})" for step in steps)


strategy = FixedMerges()
