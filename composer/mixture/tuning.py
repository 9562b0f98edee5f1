"""Calibrating a router, and reporting what it does with real prompts."""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import exp, log

from composer.mixture.composite import Composite
from composer.mixture.routing import Known
from composer.value import Value
from routers import Decision, Policy, Router

BORDER = 8
"""Prompts near the border that are shown."""
SHOWN = 160
"""Characters of each."""
MOST = 1 - 1e-9
"""The highest threshold."""
BINS = 10
"""Of confidence, when its calibration is measured."""


class Observed(Value):
    """A prompt, how a router scores it, and what each expert's answer is worth if that is known."""

    text: str
    group: str
    """The task it is of, or "" for one without."""
    scores: dict[str, float]
    values: dict[str, float] = {}


class Border(Value):
    """A prompt that could have gone elsewhere."""

    text: str
    expert: str
    other: str
    confidence: float


class RoutingReport(Value):
    """What a policy does with some prompts."""

    prompts: int
    routes: dict[str, dict[str, int]]
    """For each task: how many of its prompts each expert gets; "" are prompts without one."""
    share: dict[str, float]
    """Share of all prompts that each expert gets."""
    abstained: float
    """Share of prompts that were too unclear."""
    border: tuple[Border, ...]
    cost: float
    """Mean parameters of the expert that answers, over those of always the fallback."""
    value: dict[str, float] = {}
    """Mean of what answers are worth: routed, of always the fallback, of a random expert, of the best one for each
    prompt; empty where nothing is known."""
    calibration: float | None = None
    """Expected calibration error: mean distance between confidence and how often the likeliest expert is (one of) the
    best, in ten bins (Naeini and others 2015)."""


class Tuned(Value):
    """A calibrated policy."""

    policy: Policy
    labelled: int
    """Prompts that told which expert is right."""
    before: RoutingReport
    after: RoutingReport


def observe(router: Router, composite: Composite, known: Known, texts: Sequence[str] = ()) -> list[Observed]:
    """Route the proxy items' prompts, with what experts score on them, and some texts of which nothing is known."""
    scores = {expert.id: known.score(expert.checkpoint) for expert in composite.experts}
    found = []
    for task, asked in known.contexts().items():
        items = {name: own.task(task).items for name, own in scores.items()}
        for item, text in asked.items():
            values = {name: own[item] for name, own in items.items()}
            found.append(Observed(text=text, group=task, scores=router.route(text).scores, values=values))
    return [*found, *(Observed(text=text, group="", scores=router.route(text).scores) for text in texts)]


def tune(policy: Policy, seen: Sequence[Observed], abstain: float | None = None) -> Tuned:
    """Return a policy that says how sure it is, and abstains where that pays.

    The temperature minimises the cross-entropy with the experts that answer best (Guo and others 2017). The threshold
    is the one with the highest mean value on the same prompts, 0 if none is better than that; or, where a share of
    prompts to abstain on is given, the one that does.

    Args:
        policy: As it is.
        seen: From `observe`.
        abstain: Share of prompts, 0..1.
    """
    labelled = [(one, best) for one in seen if (best := best_of(one.values)) and len(best) < len(one.values)]
    tuned = policy
    if labelled:
        tuned = policy.model_copy(update={"temperature": _temperature(policy, labelled), "threshold": 0.0})
    sure = [tuned.decide(one.scores).confidence for one in seen]
    if abstain is not None:
        ranked = sorted(sure)
        threshold = ranked[min(round(abstain * len(ranked)), len(ranked) - 1)] if ranked else 0.0
        threshold = min(threshold, MOST)
        tuned = tuned.model_copy(update={"threshold": threshold})
    elif labelled:
        tuned = tuned.model_copy(update={"threshold": _threshold(tuned, seen, sure)})
    costs = policy.costs
    before, after = report(policy, seen, costs), report(tuned, seen, costs)
    return Tuned(policy=tuned, labelled=len(labelled), before=before, after=after)


def report(policy: Policy, seen: Sequence[Observed], costs: Mapping[str, float]) -> RoutingReport:
    """Return what a policy does with some prompts.

    Args:
        policy: Turns scores into decisions.
        seen: From `observe`.
        costs: Parameters of each expert.
    """
    decisions = [policy.decide(one.scores) for one in seen]
    routes: dict[str, Counter[str]] = {}
    for one, decision in zip(seen, decisions, strict=True):
        routes.setdefault(one.group, Counter())[decision.expert] += 1
    load = Counter(decision.expert for decision in decisions)
    order = sorted(range(len(seen)), key=lambda place: decisions[place].confidence)
    always = costs.get(policy.abstain_to, 0.0)
    spent = [costs.get(decision.expert, 0.0) for decision in decisions]
    return RoutingReport(
        prompts=len(seen),
        routes={group: dict(counts.most_common()) for group, counts in routes.items()},
        share={name: load[name] / max(len(seen), 1) for name in (seen[0].scores if seen else {})},
        abstained=sum(decision.abstained for decision in decisions) / max(len(seen), 1),
        border=tuple(_border(seen[place], decisions[place], policy) for place in order[:BORDER]),
        cost=sum(spent) / len(spent) / always if spent and always else 1.0,
        value=_value(policy, seen, decisions),
        calibration=_calibration(policy, seen),
    )


def best_of(values: Mapping[str, float]) -> list[str]:
    """Return the experts whose answers are worth most."""
    return [name for name, value in values.items() if value == max(values.values())]


def _temperature(policy: Policy, labelled: Sequence[tuple[Observed, list[str]]]) -> float:
    from scipy.optimize import minimize_scalar

    def cross_entropy(logarithm: float) -> float:
        own = policy.model_copy(update={"temperature": exp(logarithm)})
        return -sum(
            log(max(sum(own.probabilities(one.scores)[name] for name in best), 1e-12)) for one, best in labelled
        )

    return float(exp(minimize_scalar(cross_entropy, bounds=(-6.0, 6.0), method="bounded").x))


def _threshold(policy: Policy, seen: Sequence[Observed], sure: Sequence[float]) -> float:
    """Return the lowest threshold with the highest mean value."""
    valued = sorted((confidence, place) for place, confidence in enumerate(sure) if seen[place].values)
    # What is gained if the fallback answers, prompt after prompt from the most unclear one on.
    best = gained = threshold = 0.0
    for number, (confidence, place) in enumerate(valued):
        one = seen[place]
        gained += one.values[policy.abstain_to] - one.values[policy.decide(one.scores).expert]
        last = number + 1 == len(valued) or valued[number + 1][0] > confidence
        if last and gained > best + 1e-12:
            best, threshold = gained, min(confidence + 1e-9, MOST)
    return threshold


def _border(one: Observed, decision: Decision, policy: Policy) -> Border:
    chances = policy.probabilities(one.scores)
    ranked = sorted(chances, key=lambda name: -chances[name])
    other = next((name for name in ranked if name != decision.expert), decision.expert)
    return Border(text=one.text[:SHOWN], expert=decision.expert, other=other, confidence=decision.confidence)


def _value(policy: Policy, seen: Sequence[Observed], decisions: Sequence[Decision]) -> dict[str, float]:
    valued = [(one.values, decision) for one, decision in zip(seen, decisions, strict=True) if one.values]
    if not valued:
        return {}
    columns = {
        "routed": [values[decision.expert] for values, decision in valued],
        "always_fallback": [values[policy.abstain_to] for values, _ in valued],
        "random": [sum(values.values()) / len(values) for values, _ in valued],
        "best_for_each": [max(values.values()) for values, _ in valued],
    }
    return {name: sum(column) / len(column) for name, column in columns.items()}


def _calibration(policy: Policy, seen: Sequence[Observed]) -> float | None:
    bins: dict[int, list[tuple[float, bool]]] = {}
    total = 0
    for one in seen:
        best = best_of(one.values)
        if not best or len(best) == len(one.values):
            continue
        chances = policy.probabilities(one.scores)
        likeliest = max(chances, key=lambda name: chances[name])
        own = bins.setdefault(min(int(chances[likeliest] * BINS), BINS - 1), [])
        own.append((chances[likeliest], likeliest in best))
        total += 1
    if not total:
        return None
    gaps = [abs(sum(sure for sure, _ in own) - sum(right for _, right in own)) for own in bins.values()]
    return sum(gaps) / total
