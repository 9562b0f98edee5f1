"""Strategies `simmerge` and `bandit`: a predictor says which merges are worth making, and learns from those made."""

import numpy as np

from composer.artefacts import digest
from composer.clustering import Cluster
from composer.errors import MergeError
from composer.evaluation.statistics import paired_gain
from composer.merging.plan import Advice, Forecast, MergeOutcome, MergePlan, MergeStep, Trial
from composer.merging.settings import MergeSection
from composer.merging.strategies.greedy import decide, settle
from composer.merging.strategies.growth import Growth, flat_weights
from composer.merging.workbench import Workbench
from composer.simmerge.advisor import STRANGE, worth_trying
from composer.simmerge.bandit import load_bandit, teach
from composer.zoo import Lineage


class SimMerge:
    """Merges what is predicted to gain, and looks again after every merge."""

    def plan(self, cluster: Cluster, section: MergeSection) -> MergePlan:
        """Say at most how much would be made; what, is for `foresee` to say."""
        members = len(cluster.members)
        return MergePlan(
            cluster=cluster.id,
            strategy="simmerge",
            members=cluster.members,
            trials=section.simmerge.tries,
            merges=1,
            evaluations=members,
            intent=f"merge what of {members} models is predicted to gain, at most {section.simmerge.tries} tried",
        )

    def foresee(self, plan: MergePlan, advice: Advice, section: MergeSection) -> MergePlan:
        """Return the plan with the merges that are predicted to gain most."""
        if advice.refused:
            changes = {"trials": 0, "merges": 0, "intent": f"no merge is worth making: {advice.refused}"}
            return plan.model_copy(update={"advice": advice, **changes})
        tried = _worth_trying(advice, section)
        first = tried[0]
        runner_up = f"; next best {_in_words(advice.forecasts[1])}" if len(advice.forecasts) > 1 else ""
        intent = f"{_in_words(first)}, of {advice.weighed} merges weighed{runner_up}"
        steps = tuple(_step(one, f"{plan.cluster}-{place}") for place, one in enumerate(tried, start=1))
        changes = {"advice": advice, "steps": steps, "trials": len(steps), "intent": intent}
        return plan.model_copy(update=changes)

    def carry_out(self, plan: MergePlan, workbench: Workbench) -> MergeOutcome:
        """Try what is predicted to gain most; keep what does, and look what more could be merged into it."""
        trials: list[Trial] = []
        sources: dict[str, tuple[str, ...]] = {name: (name,) for name in plan.members}
        weights: dict[str, dict[str, float]] = {}
        base = workbench.zoo.base.id if workbench.zoo.base else None
        name = plan.cluster.replace("cluster", "merged")
        result: MergeStep | None = None
        steps = plan.steps
        reached = workbench.scores(plan.members) if steps else {}
        while steps:
            best = max(reached, key=lambda one: reached[one].mean)
            standings = workbench.race(steps, reached[best], "what is predicted to gain")
            trial, winner = decide(standings, reached[best], workbench, f"against {best}")
            if winner is not None and winner.scores is not None:
                try:
                    # Called what the result is called: it is one, unless more is merged into it.
                    number = f"{name}-{len(weights) + 1}" if weights else name
                    kept = workbench.keep(winner.step.model_copy(update={"name": number}))
                except MergeError as error:
                    trial, winner = trial.model_copy(update={"accepted": False, "reason": str(error)}), None
            trials.append(trial)
            if winner is None or winner.scores is None:
                break
            result = winner.step.model_copy(update={"name": kept.id})
            weights[kept.id] = flat_weights(result, weights, base)
            sources[kept.id] = tuple(dict.fromkeys(one for each in result.inputs for one in sources[each]))
            left = [one for one in plan.members if one not in sources[kept.id]]
            reached = {kept.id: winner.scores}
            steps = self._next(kept.id, left, plan, workbench) if left else ()
        if result is None:
            return workbench.outcome(plan, trials)
        return workbench.outcome(plan, trials, result, sources[result.name], weights[result.name])

    def _next(self, current: str, left: list[str], plan: MergePlan, workbench: Workbench) -> tuple[MergeStep, ...]:
        """Measure the merge so far and return what is predicted to gain if more is merged into it."""
        if workbench.advise is None:
            return ()
        models = [workbench.checkpoint(one) for one in (current, *left)]
        advice = workbench.advise(models, current)
        if advice.refused:
            return ()
        tried = _worth_trying(advice, workbench.section)
        return tuple(_step(one, f"{current}-{place}") for place, one in enumerate(tried, start=1))


class BanditMerges:
    """Makes one merge after another, each chosen by what the ones before have taught, and keeps the best."""

    def plan(self, cluster: Cluster, section: MergeSection) -> MergePlan:
        """Say how many would be made."""
        rounds = section.bandit.rounds
        return MergePlan(
            cluster=cluster.id,
            strategy="bandit",
            members=cluster.members,
            trials=rounds,
            merges=1,
            evaluations=len(cluster.members),
            intent=f"make {rounds} merges one after another, each chosen by what the others have taught; keep the best",
        )

    def foresee(self, plan: MergePlan, advice: Advice, section: MergeSection) -> MergePlan:
        """Return the plan with what there is to choose from."""
        trials = min(plan.trials, len(advice.forecasts))
        return plan.model_copy(update={"advice": advice, "trials": trials})

    def carry_out(self, plan: MergePlan, workbench: Workbench) -> MergeOutcome:
        """Choose, make, score, learn; and again.

        Raises:
            MergeError: if there is nothing to choose from.
        """
        if plan.advice is None or workbench.memory is None:
            raise MergeError("strategy 'bandit' needs a predictor to describe merges and a place to remember them")
        path = workbench.memory / "bandit.json"
        section = workbench.section.bandit
        scores = workbench.scores(plan.members)
        best = max(plan.members, key=lambda one: scores[one].mean)
        offers = list(plan.advice.forecasts)
        trials: list[Trial] = []
        found: list[Growth] = []
        for number in range(1, min(section.rounds, len(offers)) + 1):
            predicted = [one.gain if section.predictor else 0.0 for one in offers]
            place = load_bandit(path).choose(
                [one.label for one in offers],
                np.array([one.context for one in offers]),
                np.array(predicted),
                policy=section.policy,
                exploration=section.exploration,
                seed=workbench.section.seed + number,
            )
            offer = offers.pop(place)
            step = _step(offer, f"{plan.cluster}-{number}")
            standings = workbench.race([step], scores[best], f"round {number}: {offer.label}")
            trial, winner = decide(standings, scores[best], workbench, f"against {best}")
            trials.append(trial)
            if winner is not None and winner.scores is not None:
                found.append(Growth(operator=step.operator, sources=step.inputs, scores=winner.scores, step=step))
            [standing] = standings
            if standing.scores is not None:
                gain = paired_gain(standing.scores, scores[best]).mean
                key = digest([workbench.fingerprint, [one.content_hash for one in workbench.inputs(step)], offer.label])
                teach(path, key, offer.label, np.array(offer.context), predicted[place], gain)
        outcome = settle(plan, found, trials, workbench)
        # Several may gain; the one that is kept is the result.
        made = outcome.result.lineage if outcome.result else None
        kept = [one.accepted and made is not None and _made_by(one.step, made) for one in outcome.trials]
        decided = [one.model_copy(update={"accepted": own}) for one, own in zip(outcome.trials, kept, strict=True)]
        return outcome.model_copy(update={"trials": tuple(decided)})


def _made_by(step: MergeStep, lineage: Lineage) -> bool:
    given = {key: lineage.parameters[key] for key in step.parameters}
    return (step.operator, step.inputs, step.parameters) == (lineage.operator, lineage.inputs, given)


def _worth_trying(advice: Advice, section: MergeSection) -> list[Forecast]:
    enough = [one for one in advice.forecasts if worth_trying(one, section.simmerge.risk)]
    return enough[: section.simmerge.tries]


def _step(one: Forecast, name: str) -> MergeStep:
    return MergeStep(name=name, operator=one.operator, inputs=one.inputs, parameters=one.parameters)


def _in_words(one: Forecast) -> str:
    words = f"{one.label} of {', '.join(one.inputs)} ({one.gain:+.4f} predicted, {one.low:+.4f} to {one.high:+.4f})"
    return f"{words}, unlike what the predictor was trained on: to be tried" if one.novelty > STRANGE else words


strategy, bandit = SimMerge(), BanditMerges()
