"""Strategies: what is tried in which order, what is kept, and that a search survives whatever happens to it."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from composer.artefacts import Store
from composer.clustering import Cluster
from composer.errors import DiskFullError, MergeError
from composer.evaluation.scores import Scores, TaskScore
from composer.evaluation.settings import EvaluateSection
from composer.evaluation.statistics import paired_gain
from composer.executors import LocalExecutor
from composer.merging.engine.merge import lineage_of
from composer.merging.judge import Bench, Judge, Measured, Portion
from composer.merging.merge import merge_cluster
from composer.merging.plan import MergeOutcome, MergePlan, MergeStep
from composer.merging.settings import MergeSection
from composer.merging.strategies import STRATEGIES
from composer.merging.strategies.growth import flat_weights
from composer.merging.trials import TrialLog
from composer.merging.workbench import Workbench
from composer.probes import ProbesSection
from composer.zoo import Checkpoint, Zoo

MATH, SCIENCE, WEB = MEMBERS = ("stories-math", "stories-science", "stories-web")
ITEMS = tuple(f"item{number:02}" for number in range(40))
SINGLE = {MATH: 0.5, SCIENCE: 0.7, WEB: 0.6}

Scorer = Callable[[MergeStep], float]


def scores(name: str, mean: float, items: tuple[str, ...] = ITEMS, noise: float = 0.1) -> Scores:
    """Return scores around a mean: items differ, and every subject finds the same ones hard."""
    values = {item: mean + noise * random.Random(item).uniform(-1, 1) for item in items}
    if mean:
        values = {
            item: value + 0.02 * random.Random(f"{name}{mean}{item}").uniform(-1, 1) for item, value in values.items()
        }
    return Scores(subject=name, split="proxy", tasks=(TaskScore(task="t", metric="acc", items=values),))


class Scripted(Judge):
    """A judge that knows what everything scores; merges that are kept are real."""

    def __init__(self, root: Path, merged: Scorer, single: dict[str, float] = SINGLE) -> None:
        super().__init__(EvaluateSection(tasks=["none"]), ProbesSection(), root)
        self.merged, self.single = merged, single
        self.tried: list[tuple[MergeStep, int]] = []

    def score(self, checkpoint: Checkpoint, split: str = "proxy", scorer: str = "torch") -> Scores:
        return scores(checkpoint.id, self.single[checkpoint.id])

    def trial(self, step: MergeStep, inputs: object, bench: Bench, portion: Portion | None) -> Measured:
        self.tried.append((step, len((portion or {"t": ITEMS})["t"])))
        try:
            lineage_of(step, list(inputs), bench.base, bench.seed)  # type: ignore[call-overload]
        except MergeError as error:
            return Measured(scores=None, failure=str(error))
        value = self.merged(step)
        if value != value:
            return Measured(scores=None, failure="its log-likelihoods are not finite")
        key = f"{step.inputs}{step.parameters}"
        return Measured(scores=scores(key, value, (portion or {"t": ITEMS})["t"]))


Carry = Callable[..., tuple[MergeOutcome, Scripted]]


@pytest.fixture
def carry_out(quick: dict[str, Checkpoint], store: Store) -> Carry:
    def carry(
        strategy: str, merged: Scorer, members: tuple[str, ...] = MEMBERS, *, proxy: str = "items", **options: object
    ) -> object:
        judge = Scripted(store.root, merged)
        section = MergeSection.model_validate({"strategy": strategy, **options})
        bench = Workbench(
            zoo=Zoo(members=tuple(quick[name] for name in members), base=quick["stories"]),
            cluster="cluster-1",
            section=section,
            executor=LocalExecutor(lambda: judge),
            log=TrialLog(store.root / "trials.sqlite"),
            proxy={"t": ITEMS},
            fingerprint=proxy,
        )
        return merge_cluster(planned(section, members), bench), judge

    return carry  # type: ignore[return-value]


def planned(section: MergeSection, members: tuple[str, ...] = MEMBERS) -> MergePlan:
    one = Cluster(id="cluster-1", members=members, representative=members[0], reason="")
    return STRATEGIES.get(section.strategy).plan(one, section)


def by_inputs(table: dict[frozenset[str], float]) -> Scorer:
    return lambda step: table.get(frozenset(step.inputs), 0.1)


def weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in load_file(Path(checkpoint.path) / "model.safetensors").items()}


def test_average_goes_best_first_and_keeps_what_pays(quick: dict[str, Checkpoint], carry_out: Carry) -> None:
    table = {frozenset({SCIENCE, WEB}): 0.65, frozenset({SCIENCE, MATH}): 0.8}
    outcome, judge = carry_out("average", by_inputs(table))
    assert [trial.step.inputs for trial in outcome.trials] == [(SCIENCE, WEB), (SCIENCE, MATH), (SCIENCE, MATH, WEB)]
    assert [trial.accepted for trial in outcome.trials] == [False, True, False]
    assert outcome.merged == (SCIENCE, MATH)
    assert outcome.whole == (WEB,)
    assert outcome.weights == {SCIENCE: 0.5, MATH: 0.5}
    assert outcome.result is not None
    assert outcome.result.id == "merged-1"
    assert outcome.smoke is not None
    assert outcome.smoke.sample
    parts = [weights(quick[name]) for name in outcome.merged]
    for name, tensor in weights(outcome.result).items():
        assert torch.allclose(tensor, (parts[0][name] + parts[1][name]) / 2, rtol=2**-7, atol=1e-6)
    assert len(judge.tried) == 5, "two of the three are clearly behind and dropped after the first quarter"


def test_a_gain_within_noise_is_not_kept(carry_out: Carry) -> None:
    table = {frozenset({SCIENCE, WEB}): 0.703, frozenset({SCIENCE, MATH}): 0.7}
    outcome, _ = carry_out("average", by_inputs(table))
    assert outcome.result is None
    assert sorted(outcome.whole) == sorted(MEMBERS)
    assert all(
        "noise" in trial.reason or "no gain" in trial.reason or "behind" in trial.reason for trial in outcome.trials
    )
    anything, _ = carry_out("average", by_inputs(table), margin=0.0, early_stopping=False)
    assert anything.result is not None


def test_without_a_judge_everything_is_merged(carry_out: Carry) -> None:
    outcome, _ = carry_out("average", lambda step: 0.1, accept="always", early_stopping=False)
    assert set(outcome.merged) == set(MEMBERS)
    assert all(weight == pytest.approx(1 / 3) for weight in outcome.weights.values())


def shares_near(target: dict[str, float]) -> Scorer:
    """Score a mean by how near its shares are to a target."""

    def score(step: MergeStep) -> float:
        flat = flat_weights(step, {}, "stories")
        names = {*flat, *target} - {"stories"}
        return 1.0 - sum((flat.get(name, 0.0) - target.get(name, 0.0)) ** 2 for name in names) ** 0.5

    return score


def test_coefficient_keeps_the_best_of_the_grid_and_writes_that_one(
    quick: dict[str, Checkpoint], carry_out: Carry
) -> None:
    target = {SCIENCE: 0.56, WEB: 0.24, MATH: 0.2}
    outcome, _ = carry_out("coefficient", shares_near(target), early_stopping=False)
    assert outcome.weights == target, "0.7 science and 0.3 web, then 0.8 of that"
    assert [trial.tried for trial in outcome.trials] == [9, 9]
    assert outcome.result is not None
    parts = {name: weights(quick[name]) for name in MEMBERS}
    for name, tensor in weights(outcome.result).items():
        expected = sum(share * parts[one][name] for one, share in target.items())
        assert torch.allclose(tensor, expected, rtol=2**-7, atol=1e-5), name


def test_coefficient_scales_task_vectors(carry_out: Carry) -> None:
    near = shares_near(dict.fromkeys(MEMBERS, 0.4))
    outcome, _ = carry_out(
        "coefficient", lambda step: 0.3 + near(step), operators=["task_arithmetic"], early_stopping=False
    )
    assert outcome.weights == {"stories": pytest.approx(-0.2), **dict.fromkeys((SCIENCE, WEB, MATH), 0.4)}


def test_a_grid_is_of_what_makes_a_difference(carry_out: Carry) -> None:
    for operator, key in (("ties", "lambda"), ("della", "lambda"), ("dare_ties", "weight"), ("breadcrumbs", "weight")):
        _, judge = carry_out(
            "coefficient", lambda step: 0.1, operators=[operator], coefficients=[0.3, 0.6], proxy=operator
        )
        assert [step.parameters for step, _ in judge.tried[:2]] == [{key: 0.3}, {key: 0.6}], operator
    _, judge = carry_out("average", lambda step: 0.1, operators=["ties"], proxy="plain")
    assert judge.tried[0][0].parameters == {}, "divided by the sum of the weights, it is a mean as it is"


def test_coefficient_goes_on_from_a_checkpoint_where_two_at_a_time_are_taken(carry_out: Carry) -> None:
    def score(step: MergeStep) -> float:
        t = step.parameters["t"]
        return (0.85 if WEB in step.inputs else 0.95) - abs(float(t) - 0.3)  # type: ignore[arg-type]

    outcome, _ = carry_out("coefficient", score, operators=["slerp"], early_stopping=False)
    assert outcome.result is not None
    assert outcome.result.lineage is not None
    assert outcome.result.lineage.parameters == {"t": 0.3}
    assert outcome.result.lineage.inputs == ("cluster-1-slerp-1", MATH)
    assert set(outcome.merged) == set(MEMBERS)
    assert outcome.weights == {}


def test_of_several_operators_the_best_result_is_kept(carry_out: Carry) -> None:
    outcome, _ = carry_out(
        "average",
        lambda step: 0.9 if step.operator == "karcher" else 0.8,
        operators=["linear", "karcher", "ties"],
        early_stopping=False,
    )
    assert outcome.result is not None
    assert outcome.result.lineage is not None
    assert outcome.result.lineage.operator == "karcher"
    assert {trial.step.operator for trial in outcome.trials} == {"linear", "karcher", "ties"}


@pytest.mark.parametrize("order", ["most_similar", "least_similar"])
def test_similarity_is_measured_anew_after_every_merge(
    order: str, quick: dict[str, Checkpoint], carry_out: Carry
) -> None:
    names = ("stories-math", "stories-science", "stories-web", "stories-law")
    table = {**SINGLE, "stories-law": 0.55}

    def score(step: MergeStep) -> float:
        return 0.7 + 0.05 * len(step.inputs)

    judge = Scripted.score
    Scripted.score = lambda self, one, *_: scores(one.id, table[one.id])  # type: ignore[method-assign, assignment]
    try:
        outcome, _ = carry_out("similarity", score, names, order=order, coefficients=[0.5])
    finally:
        Scripted.score = judge  # type: ignore[method-assign]
    base = weights(quick["stories"])
    deltas = {name: {key: tensor - base[key] for key, tensor in weights(quick[name]).items()} for name in names}

    def cosine(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
        kinds = [key for key in first if "self_attn" in key or "mlp" in key]
        each = [torch.nn.functional.cosine_similarity(first[k].flatten(), second[k].flatten(), dim=0) for k in kinds]
        return float(sum(each) / len(each))

    current, waiting, expected = deltas[SCIENCE], [name for name in names if name != SCIENCE], [SCIENCE]
    sign = 1 if order == "most_similar" else -1
    while waiting:
        chosen = max(waiting, key=lambda name: sign * cosine(current, deltas[name]))
        waiting.remove(chosen)
        expected.append(chosen)
        current = {key: (current[key] + deltas[chosen][key]) / 2 for key in current}
    assert list(outcome.merged) == expected


def test_evolution_finds_what_a_grid_cannot(carry_out: Carry) -> None:
    target = {SCIENCE: 0.45, WEB: 0.3, MATH: 0.25}
    options = {"early_stopping": False, "evolution": {"trials": 60}}
    outcome, judge = carry_out("evolution", shares_near(target), **options)
    found = shares_near(target)
    assert outcome.result is not None
    assert outcome.result.lineage is not None
    best = found(MergeStep(name="x", operator="linear", inputs=MEMBERS, parameters=outcome.result.lineage.parameters))
    greedy = max(trial.score or 0 for trial in outcome.trials if trial.tried == 9)
    assert best > 0.97
    assert best > greedy
    drawn = [step for step, _ in judge.tried if "-g" in step.name]
    assert 60 <= len(drawn) < 60 + 10


def test_evolution_with_layer_groups_and_another_parameter(carry_out: Carry) -> None:
    seen: list[MergeStep] = []

    def score(step: MergeStep) -> float:
        seen.append(step)
        return 0.5

    options = {"trials": 8, "layer_groups": 2, "search": ["density"], "warm_start": False}
    outcome, _ = carry_out("evolution", score, operators=["ties"], evolution=options)
    assert outcome.result is None
    step = seen[-1]
    assert all(len(one) == 3 for one in step.parameters["weight"])  # type: ignore[arg-type, union-attr]
    assert 0.1 <= step.parameters["density"] <= 1.0  # type: ignore[operator]


def test_evolution_says_what_it_cannot_search() -> None:
    for message, options in (
        ("'slerp' takes 2 models at a time", {"operators": ["slerp"]}),
        ("'model_stock' has too little to search", {"operators": ["model_stock"]}),
        ("has no parameter 'wieght' to be searched", {"evolution": {"search": ["wieght"]}}),
    ):
        with pytest.raises(MergeError, match=message):
            planned(MergeSection.model_validate({"strategy": "evolution", **options}))


def test_a_search_that_was_killed_goes_on_where_it_was(carry_out: Carry) -> None:
    target = {SCIENCE: 0.45, WEB: 0.3, MATH: 0.25}
    options = {"evolution": {"trials": 40}}
    left = 25

    def dying(step: MergeStep) -> float:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return shares_near(target)(step)

    with pytest.raises(KeyboardInterrupt):
        carry_out("evolution", dying, **options)
    outcome, _ = carry_out("evolution", shares_near(target), **options)
    again, nothing = carry_out("evolution", shares_near(target), **options)
    assert nothing.tried == []
    assert again == outcome
    assert outcome.result is not None
    log = TrialLog(Path(outcome.result.path).parent.parent / "trials.sqlite")
    rows = log._base.execute("SELECT count(*), max(items) FROM trials").fetchone()
    assert rows[0] >= 40
    assert rows[1] == len(ITEMS)
    log.close()


def test_the_result_is_that_of_a_search_that_was_never_killed(carry_out: Carry, store: Store, tmp_path: Path) -> None:
    target = {SCIENCE: 0.45, WEB: 0.3, MATH: 0.25}
    options = {"evolution": {"trials": 30}}
    whole, _ = carry_out("evolution", shares_near(target), **options)
    (store.root / "trials.sqlite").unlink()
    left = 12

    def dying(step: MergeStep) -> float:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return shares_near(target)(step)

    with pytest.raises(KeyboardInterrupt):
        carry_out("evolution", dying, **options)
    resumed, _ = carry_out("evolution", shares_near(target), **options)
    assert resumed == whole


def test_candidates_that_fail_are_never_kept_and_the_search_goes_on(carry_out: Carry) -> None:
    def score(step: MergeStep) -> float:
        shares = flat_weights(step, {}, None)
        return float("nan") if shares[SCIENCE] > 0.5 else 0.9

    outcome, _ = carry_out("coefficient", score)
    assert outcome.result is not None
    assert outcome.trials[0].failed == 4
    assert outcome.trials[0].accepted
    broken, _ = carry_out("average", lambda step: float("nan"), proxy="others")
    assert broken.result is None
    assert "not finite" in broken.trials[0].reason


def test_weak_candidates_stop_early_and_the_result_is_the_same(carry_out: Carry) -> None:
    target = {SCIENCE: 0.56, WEB: 0.24, MATH: 0.2}
    slow, all_items = carry_out("coefficient", shares_near(target), early_stopping=False)
    fast, some = carry_out("coefficient", shares_near(target), proxy="others")
    assert sum(count for _, count in some.tried) < 0.6 * sum(count for _, count in all_items.tried)
    assert fast.weights == slow.weights
    assert fast.trials[0].stopped > 0


def test_fixed_makes_chains_and_judges_against_the_best_source(carry_out: Carry) -> None:
    merges = [
        {"name": "pair", "models": [MATH, SCIENCE], "operator": "slerp"},
        {"name": "all", "models": ["pair", WEB], "operator": "linear", "parameters": {"weight": [2.0, 1.0]}},
    ]
    good = {frozenset({MATH, SCIENCE}): 0.8, frozenset({"pair", WEB}): 0.9}
    outcome, _ = carry_out("fixed", by_inputs(good), merges=merges)
    assert outcome.result is not None
    assert outcome.result.id == "all"
    assert sorted(outcome.merged) == sorted(MEMBERS)
    bad = {frozenset({MATH, SCIENCE}): 0.75, frozenset({"pair", WEB}): 0.6}
    outcome, _ = carry_out("fixed", by_inputs(bad), merges=merges, proxy="others")
    assert outcome.result is not None
    assert outcome.result.id == "pair"
    assert outcome.whole == (WEB,)
    assert "its best source, stories-science" in outcome.trials[1].reason
    unseen, judge = carry_out("fixed", by_inputs(bad), merges=merges, accept="always")
    assert unseen.result is not None
    assert unseen.result.id == "all"
    assert judge.tried == []


def test_fixed_merges_flatten_to_one_weight_per_source(carry_out: Carry) -> None:
    merges = [
        {"name": "pair", "models": [MATH, SCIENCE], "operator": "linear", "parameters": {"weight": [3.0, 1.0]}},
        {"name": "all", "models": ["pair", WEB], "operator": "task_arithmetic", "parameters": {"weight": [0.4, 0.5]}},
    ]
    outcome, _ = carry_out("fixed", lambda step: 0.9, merges=merges, accept="always")
    assert outcome.weights == {"stories": 0.1, MATH: 0.3, SCIENCE: 0.1, WEB: 0.5}


def test_fixed_refuses_a_merge_across_clusters() -> None:
    merges = [{"name": "x", "models": [MATH, "outsider"], "operator": "linear"}]
    with pytest.raises(MergeError, match="'stories-math' and 'outsider', which are not in one cluster"):
        planned(MergeSection.model_validate({"strategy": "fixed", "merges": merges}))


def test_a_cluster_that_cannot_be_merged_stays_whole(carry_out: Carry, quick: dict[str, Checkpoint]) -> None:
    outcome, _ = carry_out("coefficient", lambda step: 0.9, operators=["regmean"], coefficients=[0.5])
    assert outcome.result is not None, "regmean has no coefficient, and is tried once a round"
    merges = [{"name": "x", "models": list(MEMBERS), "operator": "passthrough", "parameters": {"last": 99}}]
    outcome, _ = carry_out("fixed", lambda step: 0.9, merges=merges, accept="always")
    assert outcome.result is None
    assert outcome.whole == MEMBERS
    assert "layers 0 to 99" in outcome.trials[0].reason


def test_a_full_disk_stops_the_run_instead_of_the_branch(carry_out: Carry, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> object:
        raise DiskFullError("full")

    monkeypatch.setattr(Scripted, "keep", full)
    with pytest.raises(DiskFullError):
        carry_out("average", lambda step: 0.9)


def test_paired_gain_is_the_stratified_mean() -> None:
    def made(**tasks: list[float]) -> Scores:
        found = [
            TaskScore(task=name, metric="acc", items={str(place): value for place, value in enumerate(values)})
            for name, values in tasks.items()
        ]
        return Scores(subject="s", split="proxy", tasks=tuple(found))

    gain = paired_gain(made(a=[1, 1, 0, 1], b=[0.5, 0.5]), made(a=[0, 1, 0, 0], b=[0.1, 0.3]))
    assert gain.mean == pytest.approx((0.5 + 0.3) / 2)
    assert gain.error == pytest.approx(((1 / 3) / 4 + 0.02 / 2) ** 0.5 / 2)
    assert gain.beyond(1.0)
    assert not gain.beyond(3.0)
    assert not paired_gain(made(a=[1.0]), made(a=[1.0])).beyond(0.0), "no gain is none, however sure"
    assert paired_gain(made(a=[0.0, 0.1]), made(a=[1.0, 1.0])).behind(2.0)
    part = paired_gain(made(a=[1, 1]), made(a=[0, 1, 1, 1], b=[1.0]))
    assert part.mean == pytest.approx(0.5), "only what both were scored on"


class OnTwoTasks(Scripted):
    """A judge of two tasks: merges gain much on t, and lose a little on u against the model that is best there."""

    def score(self, checkpoint: Checkpoint, split: str = "proxy", scorer: str = "torch") -> Scores:
        return on_both(checkpoint.id, self.single[checkpoint.id], 0.5 if checkpoint.id == MATH else 0.3)

    def trial(self, step: MergeStep, inputs: object, bench: Bench, portion: Portion | None) -> Measured:
        return Measured(scores=on_both(str(step.inputs), 0.9, self.merged(step)))


def on_both(name: str, t: float, u: float) -> Scores:
    first, second = scores(name, t).tasks[0], scores(name, u).tasks[0]
    return Scores(subject=name, split="proxy", tasks=(first, second.model_copy(update={"task": "u"})))


def merged_by(
    judge: OnTwoTasks, section: MergeSection, quick: dict[str, Checkpoint], weights: dict[str, float] | None = None
) -> MergeOutcome:
    """Merge two models as a judge of two tasks has it."""
    bench = Workbench(
        zoo=Zoo(members=tuple(quick[name] for name in (MATH, WEB))),
        cluster="cluster-1",
        section=section,
        executor=LocalExecutor(lambda: judge),
        log=TrialLog(judge.root / "trials.sqlite"),
        proxy={"t": ITEMS, "u": ITEMS},
        fingerprint="both",
        weights=weights or {},
    )
    return merge_cluster(planned(section, (MATH, WEB)), bench)


def test_what_is_kept_goes_by_how_much_tasks_count_even_where_the_log_knows_it_all(
    quick: dict[str, Checkpoint], store: Store
) -> None:
    class Counting(OnTwoTasks):
        """One that weighs, as every judge does."""

        def score(self, checkpoint: Checkpoint, split: str = "proxy", scorer: str = "torch") -> Scores:
            return super().score(checkpoint, split, scorer).weighted(self.evaluate.weights)

        def trial(self, step: MergeStep, inputs: object, bench: Bench, portion: Portion | None) -> Measured:
            self.tried.append((step, 0))
            measured = super().trial(step, inputs, bench, portion)
            assert measured.scores is not None
            return Measured(scores=measured.scores.weighted(self.evaluate.weights))

    def kept(weights: dict[str, float]) -> tuple[bool, int]:
        judge = Counting(store.root, lambda step: 0.4)
        judge.evaluate = EvaluateSection(tasks=["t", "u"], weights=weights)
        section = MergeSection(strategy="average", early_stopping=False)
        outcome = merged_by(judge, section, quick, weights)
        return outcome.result is not None, len(judge.tried)

    assert kept({}) == (True, 1)
    assert kept({"u": 20}) == (False, 0)
    assert kept({"t": 1.5}) == (True, 0)


@pytest.mark.parametrize("strategy", ["average", "coefficient"])
@pytest.mark.parametrize("protect", [[], ["u"]])
def test_a_merge_that_loses_on_a_protected_task_is_not_kept(
    quick: dict[str, Checkpoint], store: Store, strategy: str, protect: list[str]
) -> None:
    judge = OnTwoTasks(store.root, lambda step: 0.4)
    section = MergeSection(strategy=strategy, protect=protect, early_stopping=False)
    outcome = merged_by(judge, section, quick)
    assert (outcome.result is None) == bool(protect)
    if protect:
        assert "protected task u would drop by" in outcome.trials[0].reason
        assert f"below {MATH}" in outcome.trials[0].reason
