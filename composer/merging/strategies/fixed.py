"""Strategy `fixed`: the merges that the recipe lists, in its order."""

from composer.clustering import Cluster
from composer.errors import MergeError
from composer.merging.plan import MergeOutcome, MergePlan, MergeStep, Trial
from composer.merging.workbench import Workbench


class FixedMerges:
    """Makes the listed merges; the last one that stands represents the cluster."""

    def plan(self, cluster: Cluster, steps: tuple[MergeStep, ...], judged: bool) -> MergePlan:
        """Plan the recipe's merges whose models are all in this cluster.

        Raises:
            MergeError: if a merge mixes models of this cluster with others.
        """
        inside = set(cluster.members)
        planned = []
        for step in steps:
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
        return MergePlan(
            cluster=cluster.id,
            strategy="fixed",
            members=cluster.members,
            steps=tuple(planned),
            merges=len(planned),
            evaluations=(len(cluster.members) + len(planned)) if planned and judged else 0,
            intent=_intent(planned),
        )

    def carry_out(self, plan: MergePlan, workbench: Workbench) -> MergeOutcome:
        """Make the merges; under `accept: proxy` a result below its best source is not kept."""
        trials: list[Trial] = []
        sources: dict[str, tuple[str, ...]] = {name: (name,) for name in plan.members}
        result: MergeStep | None = None
        for step in plan.steps:
            try:
                workbench.merge(step)
            except MergeError as error:
                trials.append(Trial(step=step, score=None, reference=None, accepted=False, reason=str(error)))
                break  # later merges may need this one
            sources[step.name] = tuple(dict.fromkeys(source for name in step.inputs for source in sources[name]))
            trial = (
                self._judge(step, sources[step.name], workbench)
                if workbench.accept == "proxy"
                else Trial(
                    step=step,
                    score=None,
                    reference=None,
                    accepted=True,
                    reason="the recipe accepts it unseen",
                )
            )
            trials.append(trial)
            if trial.accepted:
                result = step
        merged_names = sources[result.name] if result else ()
        return MergeOutcome(
            cluster=plan.cluster,
            result=workbench.checkpoint(result.name) if result else None,
            merged=merged_names,
            whole=tuple(name for name in plan.members if name not in merged_names),
            trials=tuple(trials),
        )

    def _judge(self, step: MergeStep, sources: tuple[str, ...], workbench: Workbench) -> Trial:
        score = workbench.mean_score(workbench.checkpoint(step.name))
        parents = {name: workbench.mean_score(workbench.checkpoint(name)) for name in sources}
        best = max(parents, key=lambda name: parents[name])
        accepted = score >= parents[best]
        verdict = "holds" if accepted else "falls below"
        return Trial(
            step=step,
            score=score,
            reference=parents[best],
            accepted=accepted,
            reason=f"proxy score {score:.4f} {verdict} {parents[best]:.4f} of its best source, {best}",
        )


def _intent(steps: list[MergeStep]) -> str:
    if not steps:
        return "kept whole: the recipe lists no merge of these"
    return "; ".join(f"{step.name} = {step.operator}({', '.join(step.inputs)})" for step in steps)


strategy = FixedMerges()
