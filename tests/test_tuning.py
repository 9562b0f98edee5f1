"""Calibration: confidence that means something, a threshold that pays, a report that adds up."""

import random
from math import exp

import pytest

from composer.artefacts import Store
from composer.mixture import Composite, Expert, Known, build_composite, load_router
from composer.mixture.build import with_policy
from composer.mixture.tuning import Observed, best_of, observe, report, tune
from composer.zoo import Checkpoint
from routers import Policy
from tests.conftest import NOT_ASKED
from tests.test_mixture import TO_SCRIPT, scores_of
from tests.test_routers import CODE, MATH


def drawn(count: int, temperature: float, seed: int = 0) -> list[Observed]:
    """Prompts whose right expert is drawn with the probability that scores over a temperature say."""
    dice = random.Random(seed)
    found = []
    for number in range(count):
        scores = {name: dice.gauss(0, 3) for name in "abc"}
        odds = {name: exp(score / temperature) for name, score in scores.items()}
        right = dice.choices("abc", list(odds.values()))[0]
        values = {name: float(name == right) for name in "abc"}
        found.append(Observed(text=f"prompt {number}", group="t", scores=scores, values=values))
    return found


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_temperature_is_found_and_calibrates(temperature: float) -> None:
    seen = drawn(3000, temperature)
    tuned = tune(Policy(abstain_to="a"), seen, abstain=0.0)
    assert tuned.policy.temperature == pytest.approx(temperature, rel=0.12)
    assert tuned.labelled == 3000
    assert tuned.after.calibration is not None
    assert tuned.after.calibration < 0.03
    fresh = drawn(3000, temperature, seed=1)
    fresh_report = report(tuned.policy, fresh, {})
    assert fresh_report.calibration is not None
    assert fresh_report.calibration < 0.05, "on prompts that it was not tuned on"


def test_a_threshold_is_set_where_the_fallback_is_better_and_only_there() -> None:
    # Below a lead of one the scores mean nothing, and the generalist is right.
    seen = []
    for number in range(400):
        lead = number / 100
        right = "b" if lead > 1 else "a"
        values = {name: float(name == right) for name in "abc"}
        scores = {"a": 0.0, "b": lead, "c": -1.0}
        seen.append(Observed(text=str(number), group="t", scores=scores, values=values))
    policy = Policy(abstain_to="a")
    tuned = tune(policy, seen)
    border = tuned.policy.decide({"a": 0.0, "b": 1.0, "c": -1.0}).confidence
    assert tuned.policy.threshold == pytest.approx(border, abs=0.02)
    assert tuned.after.value["routed"] == 1.0
    assert tuned.before.value["routed"] == pytest.approx(0.75)
    assert tuned.after.value["always_fallback"] == pytest.approx(0.2525)
    good = [one for one in seen if one.values["b"]]
    assert tune(policy, good).policy.threshold == 0.0


def test_a_share_of_prompts_can_be_left_to_the_fallback_without_labels() -> None:
    seen = [one.model_copy(update={"values": {}, "group": ""}) for one in drawn(1000, 1.0)]
    tuned = tune(Policy(abstain_to="a"), seen, abstain=0.2)
    assert tuned.labelled == 0
    assert tuned.policy.temperature == 1.0
    assert tuned.after.abstained == pytest.approx(0.2, abs=0.002)
    assert tuned.after.value == {}
    assert tuned.after.calibration is None


def test_a_report_adds_up() -> None:
    seen = [
        Observed(text="sure", group="one", scores={"a": 9.0, "b": 0.0}, values={"a": 1.0, "b": 0.0}),
        Observed(text="near", group="one", scores={"a": 0.0, "b": 0.1}, values={"a": 1.0, "b": 0.0}),
        Observed(text="else", group="", scores={"a": 0.0, "b": 5.0}),
    ]
    made = report(Policy(abstain_to="b"), seen, {"a": 1.0, "b": 3.0})
    assert made.routes == {"one": {"a": 1, "b": 1}, "": {"b": 1}}
    assert made.share == {"a": pytest.approx(1 / 3), "b": pytest.approx(2 / 3)}
    assert made.border[0].text == "near"
    assert (made.border[0].expert, made.border[0].other) == ("b", "a")
    assert made.cost == pytest.approx(7 / 9)
    assert made.value == {"routed": 0.5, "always_fallback": 0.0, "random": 0.5, "best_for_each": 1.0}
    assert best_of({"a": 1.0, "b": 1.0, "c": 0.0}) == ["a", "b"]


def test_a_composite_takes_another_policy_and_keeps_the_rest(quick: dict[str, Checkpoint], store: Store) -> None:
    experts = tuple(
        Expert(id=name, checkpoint=quick[name], members=(name,), examples=examples, reason="a test")
        for name, examples in (("stories-math", MATH), ("script-code", CODE))
    )
    path = build_composite("mix", experts, {}, TO_SCRIPT, store, NOT_ASKED)
    router = load_router(path)
    assert router is not None
    means = {"stories-math": (0.5, 0.5), "script-code": (0.6, 0.4)}
    contexts = {"a": {"0": MATH[0], "1": CODE[0]}}
    known = Known(score=scores_of(means), contexts=lambda: contexts, losses=NOT_ASKED.losses)
    seen = observe(router, Composite.open(path), known, ["anything"])
    assert [one.group for one in seen] == ["a", "a", ""]
    assert seen[0].values == {"stories-math": 1.0, "script-code": 1.0}
    changed = with_policy(path, Policy(abstain_to="script-code", threshold=0.999), store)
    assert changed == with_policy(path, Policy(abstain_to="script-code", threshold=0.999), store) != path
    other = load_router(changed)
    assert other is not None
    assert other.route("hm").abstained
    assert not router.route(MATH[0]).abstained
    assert other.route(MATH[0]).scores == router.route(MATH[0]).scores
