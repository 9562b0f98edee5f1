"""SimMerge: what is foreseen of a merge holds of the merge that is made, and nothing is learnt from what is judged."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from composer.artefacts import Store
from composer.clustering import Cluster
from composer.errors import MergeError, PredictorError
from composer.evaluation.in_process import score_checkpoint
from composer.evaluation.settings import EvaluateSection
from composer.evaluation.tasks import Split, load_split, part_of
from composer.executors import LocalExecutor
from composer.merging.engine.export import export
from composer.merging.engine.merge import Merge
from composer.merging.engine.shelf import Shelf
from composer.merging.judge import Judge
from composer.merging.merge import merge_cluster
from composer.merging.operators import OPERATORS
from composer.merging.plan import Forecast, MergeOutcome, MergePlan
from composer.merging.settings import MergeSection
from composer.merging.strategies import STRATEGIES
from composer.merging.trials import TrialLog
from composer.merging.workbench import Workbench
from composer.probes import ProbesSection
from composer.simmerge.advisor import Advisor, worth_trying
from composer.simmerge.arms import ARMS, Arm, arms_of
from composer.simmerge.bandit import CONTEXT, Bandit, Policy, context_of, load_bandit, teach
from composer.simmerge.corpus import load_corpus, matrix
from composer.simmerge.explanation import draw_explanation, explain_merges
from composer.simmerge.features import FEATURES, NAMES, VERSION, merge_features
from composer.simmerge.footprint import Sample, footprint, spectra, take_sample
from composer.simmerge.planner import Planner, _known
from composer.simmerge.predictor import Predictor
from composer.simmerge.signals import Signals, gather
from composer.simmerge.training import _folds, cross_validate, merges_of, train
from composer.zoo import Checkpoint, Zoo, inspect_checkpoint
from tests.conftest import MODELS, QUICKSTART, Cli

MEMBERS = ("stories-math", "stories-science", "stories-web", "stories-law")
PROBES = ProbesSection(limit=8)
CORPUS = Path(__file__).parent / "data" / "corpus.parquet"


@pytest.fixture(scope="module")
def split() -> Split:
    return load_split(["quick_math", "quick_science"], "proxy", include=str(QUICKSTART / "tasks"), limit=16)


@pytest.fixture(scope="module")
def signals(quick: dict[str, Checkpoint], shared_store: Store, split: Split) -> Signals:
    return gather([quick[name] for name in MEMBERS], quick["stories"], split, PROBES, shared_store)


@pytest.fixture(scope="module")
def sample(quick: dict[str, Checkpoint]) -> Sample:
    return take_sample([quick[name] for name in MEMBERS], quick["stories"])


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return train(load_corpus([CORPUS]), trees=40, threads=1)


def parts_of(*values: float) -> np.ndarray:
    return np.array([values])


def feature(signals: Signals, parts: np.ndarray, name: str, task: str = "quick_math", **options: bool) -> np.ndarray:
    found, _ = merge_features(signals, task, parts, np.zeros(len(parts)), **options)
    return found[:, NAMES.index(name)]


# What is known of models


def test_lengths_are_those_of_the_merge_that_is_made(
    signals: Signals, quick: dict[str, Checkpoint], store: Store
) -> None:
    arm = Arm("task_arithmetic", {"weight": 0.7})
    [step] = arm.steps(MEMBERS[:2], "merge")
    kept = export(
        Merge(step, [quick[name] for name in MEMBERS[:2]], quick["stories"], Shelf(), dtype="float32"), "kept", store
    )
    origin, merged, first, second = (
        load_file(Path(one.path) / "model.safetensors")
        for one in (quick["stories"], kept, quick[MEMBERS[0]], quick[MEMBERS[1]])
    )

    def change(model: dict, name: str) -> np.ndarray:
        return (model[name].double() - origin[name].double()).numpy().ravel()

    names = [name for name in origin if "self_attn" in name or "mlp" in name]
    lengths = {
        key: np.sqrt(sum((change(model, name) ** 2).sum() for name in names))
        for key, model in (("merged", merged), ("first", first), ("second", second))
    }
    dot = sum(change(first, name) @ change(second, name) for name in names)
    parts = parts_of(0.7, 0.7, 0, 0)
    strong = "first" if merge_features(signals, "quick_math", parts, np.zeros(1))[1][0] == 0 else "second"
    foreseen = 10 ** feature(signals, parts, "length_merged")[0]
    assert foreseen == pytest.approx(lengths["merged"] / lengths[strong], rel=1e-3)
    cosine = dot / (lengths["first"] * lengths["second"])
    assert feature(signals, parts, "cosine")[0] == pytest.approx(cosine, abs=1e-4)


def test_scores_are_those_of_the_models(
    signals: Signals, quick: dict[str, Checkpoint], shared_store: Store, split: Split
) -> None:
    for place, name in enumerate(("stories", *MEMBERS)):
        scores = score_checkpoint(quick[name], split, shared_store)
        for task in scores.tasks:
            assert signals.scores(task.task)[place] == pytest.approx(task.mean, abs=1e-6)


def test_a_merge_that_is_one_of_its_sources_is_imagined_to_score_the_same(signals: Signals) -> None:
    whole = np.eye(4)
    for name in ("imagined", "imagined_curved", "imagined_hard", "imagined_hard_curved"):
        assert feature(signals, whole, name) == pytest.approx(np.zeros(4), abs=1e-9)
    assert feature(signals, whole, "same_strong_merged") == pytest.approx(np.ones(4))
    assert (feature(signals, whole, "sources") == 0).all()


def test_divergence_is_half_a_squared_length(signals: Signals) -> None:
    gram = signals.plain.gram
    assert np.allclose(gram, gram.T)
    assert (np.diag(gram) > 0).all(), "fine-tunes differ from their base"
    assert np.linalg.eigvalsh(gram).min() > -0.2 * np.trace(gram), "about an inner product"


def test_features_know_no_order_of_the_others(signals: Signals) -> None:
    one, _ = merge_features(signals, "quick_math", parts_of(0.4, 0.4, 0.4, 0), np.zeros(1))
    swapped = Signals(
        ids=tuple(signals.ids[n] for n in (2, 1, 0, 3)),
        based=True,
        weights=signals.weights[:, [2, 1, 0, 3]][:, :, [2, 1, 0, 3]],
        size=signals.size,
        signs=signals.signs[[2, 1, 0, 3]][:, [2, 1, 0, 3]],
        energy=signals.energy[[2, 1, 0, 3]],
        overlap=signals.overlap[[2, 1, 0, 3]][:, [2, 1, 0, 3]],
        plain=_permuted(signals.plain),
        tasks={name: _permuted(own) for name, own in signals.tasks.items()},
        answers={
            name: type(table)(table.likelihoods[[0, 3, 2, 1, 4]], table.lengths, table.values)
            for name, table in signals.answers.items()
        },
    )
    two, _ = merge_features(swapped, "quick_math", parts_of(0.4, 0.4, 0.4, 0), np.zeros(1))
    assert np.allclose(one, two, equal_nan=True)


def _permuted(manners: object) -> object:
    order = [2, 1, 0, 3]
    return type(manners)(  # type: ignore[call-arg]
        gram=manners.gram[order][:, order],  # type: ignore[attr-defined]
        agreement=manners.agreement[order][:, order],  # type: ignore[attr-defined]
        alignment=manners.alignment[order][:, order],  # type: ignore[attr-defined]
        entropy=manners.entropy[order],  # type: ignore[attr-defined]
    )


def test_without_labels_no_feature_takes_one(signals: Signals) -> None:
    parts = parts_of(0.5, 0.5, 0, 0)
    found, _ = merge_features(signals, "quick_math", parts, np.zeros(1), labelled=False)
    table = signals.answers["quick_math"]
    lies = {**signals.answers, "quick_math": type(table)(table.likelihoods, table.lengths, 1 - table.values)}
    liar = Signals(**{**signals.__dict__, "answers": lies})
    again, _ = merge_features(liar, "quick_math", parts, np.zeros(1), labelled=False)
    assert np.array_equal(found, again, equal_nan=True)
    labelled, _ = merge_features(liar, "quick_math", parts, np.zeros(1))
    assert not np.array_equal(labelled, again, equal_nan=True)


def test_without_a_base_models_are_seen_from_their_mean(
    quick: dict[str, Checkpoint], shared_store: Store, split: Split
) -> None:
    found = gather([quick[name] for name in MEMBERS[:3]], None, split, PROBES, shared_store)
    assert not found.based
    assert found.weights.sum(axis=(1, 2)) == pytest.approx(0, abs=1e-6)
    assert np.isfinite(merge_features(found, "quick_math", parts_of(0.5, 0.5, 0), np.zeros(1))[0][0, :20]).all()
    own, rest = footprint("linear", {"weight": [0.3, 0.7]}, (0, 1), take_sample([quick[n] for n in MEMBERS[:3]], None))
    assert own == pytest.approx([0.3, 0.7], abs=1e-4)
    assert rest == pytest.approx(0, abs=1e-3)


def test_two_models_without_a_base_have_a_length(
    quick: dict[str, Checkpoint], shared_store: Store, split: Split
) -> None:
    first, second = quick["stories-math"], quick["stories-web"]
    found = gather([first, second], None, split, PROBES, shared_store)
    one, two = (load_file(Path(model.path) / "model.safetensors") for model in (first, second))
    names = [name for name in one if "self_attn" in name or "mlp" in name]
    square = sum(float((one[name].double() - two[name].double()).square().sum()) for name in names)
    whole = found.weights.sum(axis=0)
    assert whole == pytest.approx(np.array([[1, -1], [-1, 1]]) * square / 4, rel=1e-4), (
        "each is half the way from the mean"
    )


def test_the_base_may_be_one_of_the_models(quick: dict[str, Checkpoint], shared_store: Store, split: Split) -> None:
    names = ("stories", "stories-math", "stories-web")
    found = gather([quick[name] for name in names], quick["stories"], split, PROBES, shared_store)
    without = gather([quick[name] for name in names[1:]], quick["stories"], split, PROBES, shared_store)
    assert found.weights[:, 0].sum() == 0, "it does not differ from itself"
    assert np.allclose(found.weights[:, 1:, 1:], without.weights, rtol=1e-6)
    assert found.plain.gram[0] == pytest.approx(0, abs=1e-6)
    features, _ = merge_features(found, "quick_math", parts_of(0.5, 0.5, 0), np.zeros(1))
    assert np.isfinite(features[0][NAMES.index("imagined")])


def test_a_base_of_another_family_is_none(
    quick: dict[str, Checkpoint], shared_store: Store, split: Split, predictor_file: Path
) -> None:
    section = MergeSection(strategy="simmerge", simmerge={"predictor": str(predictor_file)})
    script = [inspect_checkpoint(name, MODELS / name, shared_store) for name in ("script-code", "script-play")]
    advice = Advisor(quick["stories"], split, PROBES, section, shared_store).advise(script)
    assert advice.forecasts
    assert all(OPERATORS.get(one.operator).start != "base" for one in advice.forecasts)


def test_one_model_is_no_cluster(quick: dict[str, Checkpoint], shared_store: Store, split: Split) -> None:
    with pytest.raises(MergeError, match="a merge needs two models, and there is 1"):
        gather([quick["stories-math"]], quick["stories"], split, PROBES, shared_store)


# What operators do


def test_directions_are_those_of_the_differences(sample: Sample) -> None:
    energy, overlap = spectra(sample)
    assert np.diag(overlap) == pytest.approx(np.ones(4))
    assert np.allclose(overlap, overlap.T)
    assert ((overlap >= 0) & (overlap <= 1 + 1e-9)).all()
    base = sample.base
    assert base is not None
    line = torch.outer(torch.arange(1.0, 1 + len(base[0])), torch.ones(base[0].shape[1]))
    one = Sample(tuple((origin + factor * line,) for factor in (0.1, 0.3) for origin in base[:1]), base[:1])
    energy, overlap = spectra(one)
    assert energy == pytest.approx(np.ones(2), abs=1e-6)


def test_models_that_changed_apart_share_no_direction() -> None:
    origin = torch.zeros(8, 8)
    first, second = origin.clone(), origin.clone()
    first[:, :4] = torch.randn(8, 4)
    second[:, 4:] = torch.randn(8, 4)
    _, overlap = spectra(Sample(((first,), (second,), (first * 2,)), (origin,)))
    assert overlap[0, 1] == pytest.approx(0, abs=1e-9)
    assert overlap[0, 2] == pytest.approx(1)


@pytest.mark.parametrize("arm", [arm for own in ARMS.values() for arm in own], ids=lambda arm: arm.label)
def test_a_footprint_is_what_the_operator_does(arm: Arm, sample: Sample) -> None:
    own, rest = footprint(arm.operator, arm.parameters(2), (0, 1), sample)
    known = _known((0, 1), arm, based=True)
    if known is not None:
        assert own == pytest.approx(known[0], abs=1e-4)
        assert rest == pytest.approx(0, abs=1e-3)
    else:
        assert (own > 0.05).all(), "a blend has something of both"
        assert (own < 1.6).all()
        assert 0 <= rest < 1


def test_a_footprint_without_its_base_is_refused(quick: dict[str, Checkpoint]) -> None:
    with pytest.raises(MergeError, match=r"set zoo\.base"):
        footprint("ties", {}, (0, 1), take_sample([quick[name] for name in MEMBERS], None))


def test_shares_add_up_and_newcomers_come_last() -> None:
    arm = Arm("linear", keeps=0.7)
    for count in (2, 3, 5):
        shares = arm.parameters(count)["weight"]
        assert sum(shares) == pytest.approx(1)
        assert shares[-1] == pytest.approx(0.3)
    assert [step.inputs for step in Arm("slerp", {"t": 0.5}).steps(("a", "b", "c"), "m")] == [("a", "b"), ("m-1", "c")]
    assert [step.name for step in Arm("ties").steps(("a", "b", "c"), "m")] == ["m"]


def test_what_cannot_be_predicted_is_refused() -> None:
    with pytest.raises(MergeError, match=r"passthrough.*stacks layers"):
        arms_of(["passthrough"])
    with pytest.raises(MergeError, match=r"fisher.*statistics"):
        arms_of(["fisher"])
    assert arms_of(["nearswap"]) == [Arm("nearswap")]
    assert all(OPERATORS.get(name) for name in ARMS)


# What is learnt


def test_no_model_that_is_judged_was_learnt_from() -> None:
    rows = merges_of(load_corpus([CORPUS]))
    judged = np.zeros(len(rows), dtype=int)
    for learn, test in _folds(rows):
        names = {name for one in rows["sources"][learn] for name in one}
        assert not names & {name for one in rows["sources"][test] for name in one}
        judged += test
    assert judged.max() == 1, "nothing is judged twice"
    found = cross_validate(rows, trees=5, threads=1)
    assert np.array_equal(np.isfinite(found), judged == 1)


def test_a_predictor_says_the_same_when_it_is_read_again(predictor: Predictor, tmp_path: Path) -> None:
    path = predictor.pack(tmp_path / "one.json.gz")
    assert path.stat().st_size < 2e6
    again = Predictor.unpack(path)
    features = matrix(merges_of(load_corpus([CORPUS])))[:20]
    first, second = predictor.predict([features]), again.predict([features])
    assert np.array_equal(first.gain, second.gain)
    assert again.key == predictor.key
    assert predictor.reasons(features).shape == features.shape


def test_intervals_hold_what_they_say_and_get_wider(predictor: Predictor) -> None:
    rows = merges_of(load_corpus([CORPUS]))
    prediction = predictor.predict([matrix(rows)])
    middle, low, high = predictor.interval(prediction, 0.8)
    _, lower, higher = predictor.interval(prediction, 0.95)
    assert (lower <= low).all()
    assert (higher >= high).all()
    inside = (low[:, 0] <= rows["gain"]) & (rows["gain"] <= high[:, 0])
    assert inside.mean() > 0.75, "cross-validated errors are no smaller than those on what was learnt"
    chance = predictor.chance(middle[:, 0], prediction)
    assert ((chance >= 0) & (chance <= 1)).all()
    assert (predictor.chance(middle[:, 0] + 0.1, prediction) >= chance).all()
    assert predictor.chance(middle[:, 0] + 10, prediction).min() > 0.99


def test_what_is_unlike_the_training_is_said_to_be(predictor: Predictor) -> None:
    features = matrix(merges_of(load_corpus([CORPUS])))
    assert predictor.novelty(features).mean() < 0.1
    assert (predictor.novelty(features + 100) > 0.5).all()


def test_predictors_of_other_features_are_refused(predictor: Predictor, tmp_path: Path) -> None:
    other = predictor.model_copy(update={"version": VERSION + 1}).pack(tmp_path / "other.json.gz")
    with pytest.raises(PredictorError, match="simmerge train"):
        Predictor.unpack(other)
    broken = tmp_path / "broken.json.gz"
    broken.write_bytes(other.read_bytes()[:100])
    with pytest.raises(PredictorError, match="is no predictor"):
        Predictor.unpack(broken)
    with pytest.raises(PredictorError, match="is no predictor"):
        Predictor.unpack(tmp_path / "absent.json.gz")


def test_a_corpus_that_is_too_small_or_of_other_features_is_refused(tmp_path: Path) -> None:
    table = load_corpus([CORPUS])
    with pytest.raises(PredictorError, match="takes 200"):
        train(table[:50], threads=1)
    table.assign(version=VERSION + 1).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(PredictorError, match="simmerge collect"):
        load_corpus([tmp_path / "other.parquet"])
    (tmp_path / "none.parquet").write_text("no")
    with pytest.raises(PredictorError, match="is no corpus"):
        load_corpus([tmp_path / "none.parquet"])
    assert len(load_corpus([CORPUS, CORPUS])) == len(table), "a merge counts once"


# What is planned


def planner(signals: Signals, sample: Sample, predictor: Predictor) -> Planner:
    return Planner(signals, sample, predictor, tasks=("quick_math", "quick_science"))


def test_every_subset_is_weighed_and_the_best_comes_first(
    signals: Signals, sample: Sample, predictor: Predictor
) -> None:
    found = planner(signals, sample, predictor).search(arms_of(["linear", "task_arithmetic", "ties", "slerp"]))
    assert {len(one.sources) for one in found} == {2, 3, 4}
    assert len({tuple(sorted(one.sources)) for one in found}) == 11
    assert [one.gain for one in found] == sorted((one.gain for one in found), reverse=True)
    assert all(one.low <= one.gain <= one.high and 0 <= one.chance <= 1 for one in found)
    assert {len(one.sources) for one in found if one.arm.operator == "slerp"} == {2}


def test_a_task_that_counts_more_moves_the_plan_towards_it(
    signals: Signals, sample: Sample, predictor: Predictor
) -> None:
    arms = arms_of(["linear", "task_arithmetic"])
    for task in ("quick_math", "quick_science"):
        one = Planner(signals, sample, predictor, ("quick_math", "quick_science"), weights={task: 1000})
        alone = Planner(signals, sample, predictor, (task,))
        assert one.reference == pytest.approx(alone.reference, abs=0.01)
        found, expected = one.search(arms)[0], alone.search(arms)[0]
        assert found.gain == pytest.approx(expected.gain, abs=0.01)
    even = Planner(signals, sample, predictor, ("quick_math", "quick_science"), weights={"quick_math": 7})
    same = Planner(signals, sample, predictor, ("quick_math", "quick_science"), weights={"quick_math": 1})
    assert even.reference != pytest.approx(same.reference, abs=1e-9)


def test_a_beam_search_finds_what_an_exact_one_does(
    signals: Signals, sample: Sample, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = arms_of(["linear", "task_arithmetic"])
    exact = planner(signals, sample, predictor).search(arms)
    monkeypatch.setattr("composer.simmerge.planner.EXACT", 1)
    beam = planner(signals, sample, predictor).search(arms)
    assert beam[0].gain == pytest.approx(exact[0].gain)
    assert set(beam[0].sources) == set(exact[0].sources)


def test_the_best_single_model_is_not_flattered_by_noise(
    signals: Signals, sample: Sample, predictor: Predictor
) -> None:
    one = planner(signals, sample, predictor)
    raw = np.stack([signals.scores(task)[1:] for task in one.tasks], axis=1).mean(axis=1)
    assert one.reference <= raw.max() + 1e-12
    assert one.reference >= raw.mean()


# What is learnt on the way


@pytest.mark.parametrize("policy", ["linucb", "thompson"])
def test_a_bandit_learns_which_arm_pays_and_keeps_it(policy: Policy, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    path = tmp_path / "bandit.json"
    truth = {"a": -0.06, "b": 0.0, "c": -0.12}
    chosen = []
    for turn in range(80):
        contexts = np.concatenate([np.ones((3, 1)), generator.normal(size=(3, len(CONTEXT))) * 0.1], axis=1)
        place = load_bandit(path).choose(list(truth), contexts, np.zeros(3), policy=policy, seed=turn)
        label = list(truth)[place]
        chosen.append(label)
        teach(path, str(turn), label, contexts[place], 0.0, truth[label] + 0.01 * generator.normal())
    assert chosen[-20:].count("b") > 15
    assert set(chosen[:20]) == set(truth), "nothing is left untried"
    teach(path, "0", "a", contexts[0], 0.0, 1.0)
    assert len(load_bandit(path).observations) == 80, "nothing is taught twice"


def test_a_bandit_begins_where_the_predictor_is() -> None:
    contexts = np.zeros((2, 1 + len(CONTEXT)))
    contexts[:, 0] = 1
    assert Bandit().choose(["a", "b"], contexts, np.array([0.0, 0.01])) == 1
    assert Bandit().choose(["a", "b"], contexts, np.array([0.01, 0.0]), policy="thompson", exploration=1e-6) == 0


def test_a_bandit_that_knew_other_features_starts_anew(tmp_path: Path) -> None:
    path = Bandit(version=VERSION + 1).save(tmp_path / "bandit.json")
    assert load_bandit(path).observations == ()
    assert load_bandit(path).version == VERSION


def test_contexts_bear_what_is_not_known() -> None:
    features = np.full((2, len(NAMES)), np.nan)
    assert np.isfinite(context_of([features, features])).all()


def test_every_feature_says_what_it_is() -> None:
    assert all(one.summary and one.unit for one in FEATURES.values())
    assert len(json.dumps(list(FEATURES))) > 0


def test_parts_of_a_split_do_not_overlap(split: Split) -> None:
    first, second = part_of(split, 0, 0.25), part_of(split, 0.25, 1)
    for whole, one, other in zip(split.tasks, first.tasks, second.tasks, strict=True):
        assert set(one.hashes) | set(other.hashes) == set(whole.hashes)
        assert not set(one.hashes) & set(other.hashes)
        assert len(one.hashes) == 4


# What is done about it


@pytest.fixture
def predictor_file(predictor: Predictor, tmp_path: Path) -> Path:
    return predictor.pack(tmp_path / "predictor.json.gz")


Run = Callable[..., tuple[MergePlan, MergeOutcome, Workbench]]


@pytest.fixture
def run(quick: dict[str, Checkpoint], shared_store: Store, split: Split, predictor_file: Path, tmp_path: Path) -> Run:
    """Plan and carry out a strategy on the four fine-tunes; returns plan, outcome and workbench."""

    def act(strategy: str, **settings: object) -> tuple[MergePlan, MergeOutcome, Workbench]:
        own = {"predictor": str(predictor_file), **settings.pop("simmerge", {})}  # type: ignore[dict-item]
        section = MergeSection(
            strategy=strategy, operators=["linear", "task_arithmetic", "slerp"], simmerge=own, **settings
        )
        evaluate = EvaluateSection(tasks=["quick_math", "quick_science"], include=str(QUICKSTART / "tasks"))
        judge = Judge(evaluate, PROBES, shared_store.root, {"proxy": split})
        executor = LocalExecutor(lambda: judge)
        advisor = Advisor(quick["stories"], split, PROBES, section, shared_store, lambda: executor)
        kind = STRATEGIES.get(strategy)
        cluster = Cluster(id="cluster-1", members=MEMBERS, representative=MEMBERS[0], reason="")
        models = [quick[name] for name in MEMBERS]
        plan = kind.foresee(kind.plan(cluster, section), advisor.advise(models), section)  # type: ignore[attr-defined]
        bench = Workbench(
            zoo=Zoo(members=tuple(models), base=quick["stories"]),
            cluster="cluster-1",
            section=section,
            executor=LocalExecutor(lambda: judge),
            log=TrialLog(tmp_path / "trials.sqlite"),
            proxy={items.name: items.hashes for items in split.tasks},
            fingerprint=split.fingerprint,
            advise=advisor.advise,
            memory=tmp_path,
        )
        return plan, merge_cluster(plan, bench), bench

    return act


def test_only_what_is_predicted_to_gain_is_made(run: Run) -> None:
    plan, outcome, bench = run("simmerge", margin=0, simmerge={"tries": 2, "risk": 0.9})
    assert plan.advice is not None
    assert plan.advice.refused is None
    assert plan.advice.weighed > 50
    first = plan.advice.forecasts[0]
    assert plan.steps[0].inputs == first.inputs
    assert plan.steps[0].parameters == first.parameters
    assert first.label in plan.intent
    assert len(plan.steps) <= 2
    made = bench.log._base.execute("SELECT count(*) FROM trials").fetchone()[0]
    assert made <= 2 * len(outcome.trials)
    assert outcome.failure is None
    if outcome.result is not None:
        assert outcome.result.lineage is not None
        assert set(outcome.merged) | set(outcome.whole) == set(MEMBERS)
        assert outcome.trials[0].accepted


def test_after_a_merge_the_rest_is_looked_at_again(run: Run) -> None:
    _, outcome, bench = run("simmerge", accept="always", simmerge={"tries": 1, "risk": 0.95, "most": 2})
    assert outcome.result is not None
    assert len(outcome.trials) > 1, "what was merged is merged with more"
    later = outcome.trials[1].step
    assert any(name in bench.made for name in later.inputs), "the merge itself was observed and weighed"
    assert len(outcome.merged) > 2


def test_what_is_predicted_to_lose_is_refused_and_nothing_is_made(run: Run) -> None:
    plan, outcome, bench = run("simmerge", simmerge={"risk": 0.001, "most": 2})
    assert plan.advice is not None
    assert "merge.simmerge.risk" in str(plan.advice.refused)
    assert plan.trials == plan.merges == 0
    assert outcome.result is None
    assert outcome.whole == MEMBERS
    assert bench.log._base.execute("SELECT count(*) FROM trials").fetchone()[0] == 0


def test_what_is_unlike_all_training_is_tried_rather_than_refused() -> None:
    known = Forecast(
        operator="linear", inputs=("a", "b"), parameters={}, label="linear", gain=-0.1, low=-0.2, high=0.0, chance=0.1,
        by_task={}, novelty=0.0,
    )  # fmt: skip
    assert not worth_trying(known, 0.5)
    assert worth_trying(known, 0.95)
    assert worth_trying(known.model_copy(update={"novelty": 0.2}), 0.5)


def test_the_bandit_makes_as_many_as_it_is_told_and_remembers(run: Run, tmp_path: Path) -> None:
    plan, outcome, bench = run("bandit", margin=0, bandit={"rounds": 4})
    assert plan.advice is not None
    labels = [one.label for one in plan.advice.forecasts]
    assert len(labels) == len(set(labels)), "one offer of each arm"
    assert len(outcome.trials) == 4
    assert len({json.dumps([t.step.operator, t.step.parameters]) for t in outcome.trials}) == 4
    known = load_bandit(tmp_path / "bandit.json")
    assert len(known.observations) == 4
    assert sum(trial.accepted for trial in outcome.trials) == (outcome.result is not None)
    best = max(bench.scores(MEMBERS).values(), key=lambda one: one.mean)
    if outcome.result is not None:
        assert max(t.score or 0 for t in outcome.trials if t.accepted) > best.mean


def test_a_bandit_without_memory_says_so(run: Run) -> None:
    plan, _, bench = run("bandit", bandit={"rounds": 1})
    bench.memory = None
    assert "a place to remember" in str(merge_cluster(plan, bench).failure)


def test_an_explanation_names_what_drives_the_choice(
    quick: dict[str, Checkpoint], shared_store: Store, split: Split, predictor_file: Path, tmp_path: Path
) -> None:
    section = MergeSection(
        strategy="simmerge", operators=["linear", "ties"], simmerge={"predictor": str(predictor_file)}
    )
    advisor = Advisor(quick["stories"], split, PROBES, section, shared_store)
    found = explain_merges(advisor, [quick["stories-math"], quick["stories-science"]])
    assert {found.chosen.operator, *(one.operator for one in found.others)} == {"linear", "ties"}
    effects = [abs(one.effect) for one in found.reasons]
    assert effects == sorted(effects, reverse=True)
    assert effects[0] > 0
    assert found.reasons[0].feature in found.in_words()
    draw_explanation(found, tmp_path / "why.svg")
    assert "<svg" in (tmp_path / "why.svg").read_text()


# By the command line


@pytest.mark.slow
def test_a_predictor_is_trained_shown_and_used_by_the_command_line(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "mine.json.gz"
    trained = cli("simmerge", "train", CORPUS, "--out", out, "--threads", "1")
    assert trained.returncode == 0, trained.stderr
    assert "94 merges" in trained.stdout
    shown = cli("simmerge", "card", "--predictor", out)
    assert "mean absolute error" in shown.stdout
    assert json.loads(cli("simmerge", "card", "--predictor", out, "--json").stdout)["rows"] == 564
    small = ["evaluate.tasks=[quick_math]", "evaluate.proxy_limit=8", "merge.operators=[linear, ties]"]
    small.append(f"merge.simmerge.predictor={out}")
    recipe = QUICKSTART.with_suffix(".yaml")
    models = "stories-math,stories-science"
    why = cli("simmerge", "explain", recipe, *small, "--models", models, "--plot", tmp_path / "why.png")
    assert why.returncode == 0, why.stderr
    assert "what speaks for it and against it" in why.stdout
    assert (tmp_path / "why.png").stat().st_size > 10_000
    wrong = cli("simmerge", "explain", recipe, *small, "--models", "stories-math,script-code")
    assert wrong.returncode == 4
    assert "cannot be merged" in wrong.stderr
    unknown = cli("simmerge", "explain", recipe, *small, "--models", "stories-maths,script-code")
    assert unknown.returncode == 2
    assert "stories-math" in unknown.stderr
    alone = cli("simmerge", "explain", recipe, *small, "--models", "stories-math")
    assert alone.returncode == 4
    assert "a merge needs two models" in alone.stderr
    absent = cli("simmerge", "card", "--predictor", tmp_path / "absent.json.gz")
    assert absent.returncode == 10
    assert absent.stderr.startswith("error: ")


@pytest.mark.slow
def test_a_collection_that_was_stopped_scores_nothing_again(cli: Cli, tmp_path: Path) -> None:
    recipe = QUICKSTART.with_suffix(".yaml")
    small = ["evaluate.tasks=[quick_math]", "evaluate.proxy_limit=8", "merge.operators=[linear]", "probes.limit=4"]
    store = tmp_path / "store"
    for pairs, out in ((2, "first.parquet"), (3, "second.parquet")):
        done = cli(
            "simmerge", "collect", recipe, *small, "--pairs", str(pairs), "--out", tmp_path / out, "--store", store
        )
        assert done.returncode == 0, done.stderr
        assert "left out: script-code" in done.stdout
    first, second = (load_corpus([tmp_path / name]) for name in ("first.parquet", "second.parquet"))
    assert len(second) > len(first)
    log = TrialLog(store / "trials.sqlite")
    counts = log._base.execute("SELECT count(*), count(DISTINCT time) FROM trials").fetchone()
    assert counts[0] == len(merges(second)), "each merge was scored once"
    kept = set(zip(merges(first)["arm"], merges(first)["score"], strict=True))
    assert kept <= set(zip(merges(second)["arm"], merges(second)["score"], strict=True))


def merges(table: object) -> object:
    return table[(table["arm"] != "single") & table["labelled"]]  # type: ignore[index]
