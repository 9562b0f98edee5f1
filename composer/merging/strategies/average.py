"""Strategy `average`: a greedy uniform average, best model first.

Model-GLUE's Heuristic-Average (arXiv 2410.05357, section 3.2): candidates come in falling order of their
proxy score; each is averaged in, with equal weight to all that are in already, and stays only if the proxy
score does not fall.
"""

from composer.clustering import Cluster
from composer.errors import MergeError
from composer.merging.plan import MergeOutcome, MergePlan, MergeStep, Trial
from composer.merging.workbench import Workbench


class GreedyAverage:
    """Averages members one after another while the proxy score holds."""

    def plan(self, cluster: Cluster, steps: tuple[MergeStep, ...], judged: bool) -> MergePlan:
        """Plan at most one merge less than there are members, and scores for members and merges."""
        candidates = len(cluster.members) - 1
        held = "while the proxy score holds" if judged else "all of them"
        return MergePlan(
            cluster=cluster.id,
            strategy="average",
            members=cluster.members,
            merges=candidates,
            evaluations=len(cluster.members) + candidates,
            intent=f"average {len(cluster.members)} models greedily, best first, {held}",
        )

    def carry_out(self, plan: MergePlan, workbench: Workbench) -> MergeOutcome:
        """Average greedily.

        The uniform average of the accepted members is made anew from the members in every round, so no
        rounding to the storage type builds up from round to round.
        """
        scores = {name: workbench.mean_score(workbench.checkpoint(name)) for name in plan.members}
        first, *candidates = sorted(plan.members, key=lambda name: -scores[name])
        accepted, best, result = [first], scores[first], None
        trials = []
        for number, candidate in enumerate(candidates, start=1):
            step = MergeStep(name=f"{plan.cluster}-average-{number}", operator="linear", inputs=(*accepted, candidate))
            trial = self._try(step, best, workbench)
            trials.append(trial)
            if trial.accepted:
                accepted.append(candidate)
                result = workbench.checkpoint(step.name).renamed(plan.cluster.replace("cluster", "merged"))
                best = trial.score if trial.score is not None else best
        return MergeOutcome(
            cluster=plan.cluster,
            result=result,
            merged=tuple(accepted) if result else (),
            whole=tuple(name for name in plan.members if result is None or name not in accepted),
            trials=tuple(trials),
            weights={name: 1 / len(accepted) for name in accepted} if result else {},
        )

    def _try(self, step: MergeStep, best: float, workbench: Workbench) -> Trial:
        try:
            merged = workbench.merge(step)
        except MergeError as error:
            return Trial(step=step, score=None, reference=best, accepted=False, reason=str(error))
        score = workbench.mean_score(merged)
        accepted = workbench.accept == "always" or score >= best
        verdict = "holds" if score >= best else "falls below"
        return Trial(
            step=step,
            score=score,
            reference=best,
            accepted=accepted,
            reason=f"proxy score {score:.4f} {verdict} {best:.4f} with {step.inputs[-1]} averaged in",
        )


strategy = GreedyAverage()
