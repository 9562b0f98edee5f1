"""Strategies `average`, `coefficient` and `similarity`: one model after another is merged in while it pays.

Model-GLUE's heuristic searches (arXiv 2410.05357, section 3.2). They differ in what comes next (the best on the proxy
split, or the most or least similar to the merge so far, measured anew after every merge) and in how much of it (the
plain average, or the best of a grid). Unlike there, what is kept is what was scored; a model is merged in only if
that pays beyond noise; and one that did not pay is tried again once others have been merged in.
"""

from collections.abc import Iterator
from typing import cast

from composer.clustering import Cluster
from composer.errors import MergeError
from composer.evaluation.scores import Scores
from composer.evaluation.statistics import paired_gain
from composer.merging.operators import OPERATORS
from composer.merging.plan import MergeOutcome, MergePlan, MergeStep, Trial
from composer.merging.settings import MergeSection
from composer.merging.strategies.growth import Growth, flat_weights
from composer.merging.workbench import Standing, Workbench


class Greedy:
    """Merges members in one after another."""

    def __init__(self, name: str, *, grid: bool, by_similarity: bool) -> None:
        self.name, self.grid, self.by_similarity = name, grid, by_similarity

    def plan(self, cluster: Cluster, section: MergeSection) -> MergePlan:
        """Plan a round for each newcomer, and a second look at those that did not pay.

        Raises:
            MergeError: if an operator does not take one model after another.
        """
        members = len(cluster.members)
        rounds = members * (members - 1) // 2
        trials = merges = 0
        for name in section.searched:
            operator = OPERATORS.get(name)
            if name == "passthrough":
                raise MergeError("operator 'passthrough' stacks layers, it does not blend; use strategy 'fixed'")
            trials += rounds * (len(section.coefficients) if self.grid and operator.coefficient else 1)
            merges += (members - 1) if operator.most == 2 else 1
        held = "while it pays beyond noise" if section.accept == "proxy" else "all of them"
        order = section.order.replace("_", " ") if self.by_similarity else "best"
        return MergePlan(
            cluster=cluster.id,
            strategy=self.name,
            members=cluster.members,
            operators=tuple(section.searched),
            trials=trials,
            merges=merges,
            evaluations=members,
            intent=f"merge {members} models one after another by {' or '.join(section.searched)}, "
            f"{order} first, {held}",
        )

    def carry_out(self, plan: MergePlan, workbench: Workbench) -> MergeOutcome:
        """Search with each operator; of what they find the best on the proxy split is kept."""
        scores = workbench.scores(plan.members)
        trials: list[Trial] = []
        found = [self.search(operator, plan, scores, workbench, trials) for operator in plan.operators]
        return settle(plan, [one for one in found if one.step], trials, workbench)

    def search(
        self, operator: str, plan: MergePlan, scores: dict[str, Scores], workbench: Workbench, trials: list[Trial]
    ) -> Growth:
        """Merge members in one after another with one operator; append to `trials` what was decided."""
        first = max(plan.members, key=lambda name: scores[name].mean)
        growth = Growth(operator=operator, sources=(first,), scores=scores[first])
        waiting = [name for name in sorted(plan.members, key=lambda name: -scores[name].mean) if name != first]
        refused: list[str] = []
        grid = tuple(workbench.section.coefficients) if self.grid else ()
        number = 0
        while waiting:
            newcomer, near = self._next(growth, waiting, workbench)
            waiting.remove(newcomer)
            number += 1
            name = f"{plan.cluster}-{operator}-{number}".replace("_", "-")
            steps = growth.candidates(newcomer, grid, name)
            standings = workbench.race(steps, growth.scores, f"{operator}: {newcomer} into {growth.current}")
            trial, winner = decide(standings, growth.scores, workbench, f"with {newcomer} merged in{near}")
            if winner is not None and growth.kind.most == 2:
                try:
                    workbench.keep(winner.step)
                except MergeError as error:
                    trial, winner = trial.model_copy(update={"accepted": False, "reason": str(error)}), None
            trials.append(trial)
            if winner is None:
                refused.append(newcomer)
                continue
            growth = growth.grown(winner.step, newcomer, cast("Scores", winner.scores))
            waiting += refused  # there is something else to be merged into now
            refused = []
        return growth

    def _next(self, growth: Growth, waiting: list[str], workbench: Workbench) -> tuple[str, str]:
        """Return what comes next, and in words how similar it is to the merge so far."""
        if not self.by_similarity:
            return waiting[0], ""
        step = growth.step or MergeStep(name=growth.current, operator="passthrough", inputs=growth.sources)
        near = workbench.closeness(step, waiting)
        sign = 1 if workbench.section.order == "most_similar" else -1
        chosen = max(waiting, key=lambda name: sign * near[name])
        return chosen, f" (cosine {near[chosen]:.2f} to what it joins)"


def decide(standings: list[Standing], best: Scores, workbench: Workbench, what: str) -> tuple[Trial, Standing | None]:
    """Return the decision on a round of candidates, and the winner if it is to be kept."""
    complete = [(paired_gain(one.scores, best), one) for one in standings if one.complete and one.scores]
    failures = [one.measured.failure for one in standings if one.measured.failure]
    counts: dict[str, float] = {
        "tried": len(standings),
        "failed": len(failures),
        "stopped": len(standings) - len(failures) - len(complete),
        "reference": best.mean,
    }
    if not complete:
        reason = failures[0] if failures else f"clearly behind {best.mean:.4f} {what}, and dropped early"
        return Trial(step=standings[0].step, score=None, accepted=False, reason=str(reason), **counts), None
    judged = [(gain, one, workbench.lost(one.step, cast("Scores", one.scores))) for gain, one in complete]
    gain, winner, lost = max(judged, key=lambda one: (one[2] is None, one[0].mean))
    pays = lost is None and workbench.pays(gain)
    margin = workbench.section.margin
    # With a margin of 0 a gain is taken that may be noise, and is called so.
    verdict = "beyond noise" if gain.beyond(margin or 1.0) else ("within noise" if gain.mean > 0 else "no gain")
    trial = Trial(
        step=winner.step,
        score=cast("Scores", winner.scores).mean,
        gain=gain.mean,
        error=gain.error,
        accepted=pays,
        reason=f"{gain.mean:+.4f} ± {gain.error:.4f} {what}: {lost or verdict}",
        **counts,
    )
    return trial, winner if pays else None


def settle(plan: MergePlan, found: list[Growth], trials: list[Trial], workbench: Workbench) -> MergeOutcome:
    """Write the best of what was found, or the next best if it fails the smoke check."""
    name = plan.cluster.replace("cluster", "merged")
    for growth in sorted(found, key=lambda one: -one.scores.mean):
        step = cast("MergeStep", growth.step).model_copy(update={"name": name})
        try:
            workbench.keep(step)
        except MergeError as error:
            trials.append(Trial(step=step, score=growth.scores.mean, reference=None, accepted=False, reason=str(error)))
            continue
        made: dict[str, dict[str, float]] = {one: {} for one in workbench.made if one != name}
        base = workbench.zoo.base.id if workbench.zoo.base else None
        return workbench.outcome(plan, trials, step, growth.sources, flat_weights(step, made, base))
    return workbench.outcome(plan, trials)


def strategies() -> Iterator[Greedy]:
    """Yield the three strategies."""
    yield Greedy("average", grid=False, by_similarity=False)
    yield Greedy("coefficient", grid=True, by_similarity=False)
    yield Greedy("similarity", grid=True, by_similarity=True)


average, coefficient, similarity = strategies()
