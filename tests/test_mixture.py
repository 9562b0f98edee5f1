"""The mixture: who becomes an expert, and what is written down."""

from pathlib import Path

import pytest

from composer.artefacts import Store
from composer.errors import RecipeError
from composer.evaluation.scores import Scores, TaskScore
from composer.merging.plan import MergeOutcome, MergeStep, Trial
from composer.mixture import MANIFEST, Composite, Expert, build_composite, choose_experts, load_router
from composer.mixture.settings import RouterSection
from composer.zoo import Checkpoint, Zoo
from tests.test_routers import CODE, MATH

NAMES = ("stories-math", "stories-science", "stories-web")


def scores_of(means: dict[str, tuple[float, float]]):  # type: ignore[no-untyped-def]
    """Score checkpoints as told: two tasks of a hundred items each."""

    def score(checkpoint: Checkpoint) -> Scores:
        tasks = []
        for name, mean in zip(("a", "b"), means[checkpoint.id], strict=True):
            items = {str(i): float(i < round(mean * 100)) for i in range(100)}
            tasks.append(TaskScore(task=name, metric="acc", items=items))
        return Scores(subject=checkpoint.id, split="proxy", tasks=tuple(tasks))

    return score


def rejected(*inputs: str) -> Trial:
    step = MergeStep(name="trial", operator="linear", inputs=inputs)
    return Trial(step=step, score=0.1, reference=0.5, accepted=False, reason="falls")


@pytest.fixture
def zoo(quick: dict[str, Checkpoint]) -> Zoo:
    return Zoo(members=tuple(quick[name] for name in NAMES), examples=dict.fromkeys(NAMES, MATH))


def test_a_rejected_model_stays_only_where_it_is_ahead(zoo: Zoo) -> None:
    math, science, web = NAMES
    merged = zoo[math].renamed("merged-1")
    outcome = MergeOutcome(
        cluster="c",
        result=merged,
        merged=(math,),
        whole=(science, web),
        trials=(rejected(math, science), rejected(math, web)),
    )
    score = scores_of({"merged-1": (0.5, 0.5), science: (0.4, 0.9), web: (0.45, 0.5)})
    experts, left_out = choose_experts(zoo, [outcome], score)
    assert [expert.id for expert in experts] == ["merged-1", science]
    assert "it is ahead on b" in experts[1].reason
    assert left_out == {web: "merging it in does not pay on the proxy split, and it beats merged-1 on no proxy task"}


def test_where_nothing_merges_the_best_member_stands_for_the_cluster(zoo: Zoo) -> None:
    math, science, web = NAMES
    outcome = MergeOutcome(cluster="c", result=None, whole=NAMES, trials=(rejected(math, science), rejected(math, web)))
    score = scores_of({math: (0.6, 0.6), science: (0.5, 0.5), web: (0.1, 0.8)})
    experts, left_out = choose_experts(zoo, [outcome], score)
    assert [expert.id for expert in experts] == [math, web]
    assert list(left_out) == [science]


def test_a_cluster_that_failed_loses_nobody(zoo: Zoo) -> None:
    outcome = MergeOutcome(cluster="c", result=None, whole=NAMES, failure="no base")
    experts, left_out = choose_experts(zoo, [outcome], lambda checkpoint: pytest.fail("not asked"))
    assert [expert.id for expert in experts] == list(NAMES)
    assert "could not be merged: no base" in experts[0].reason
    assert left_out == {}


def expert(checkpoint: Checkpoint, examples: tuple[str, ...]) -> Expert:
    return Expert(id=checkpoint.id, checkpoint=checkpoint, members=(checkpoint.id,), examples=examples, reason="a test")


def test_a_composite_is_written_once_and_loads(quick: dict[str, Checkpoint], store: Store) -> None:
    experts = (expert(quick["stories-math"], MATH), expert(quick["script-code"], CODE))
    score = scores_of({"stories-math": (0.4, 0.4), "script-code": (0.6, 0.6)})
    path = build_composite("mix", experts, {"x": "broken"}, RouterSection(), store, score)
    assert (
        build_composite("mix", experts, {"x": "broken"}, RouterSection(), store, lambda one: pytest.fail("made"))
        == path
    )
    composite = Composite.load(path / MANIFEST)
    assert composite.router is not None
    assert composite.router.fallback == "script-code", "the strongest on the proxy split"
    router = load_router(path)
    assert router is not None
    assert router.route(CODE[0]).expert == "script-code"
    card = (path / "README.md").read_text()
    for text in ("stories-math", "script-code", "apache-2.0", "x: broken", "Routing"):
        assert text in card


def test_one_expert_needs_no_router(quick: dict[str, Checkpoint], store: Store) -> None:
    path = build_composite(
        "mix", (expert(quick["stories-math"], ()),), {}, RouterSection(), store, lambda one: pytest.fail("not asked")
    )
    assert load_router(path) is None


def test_an_expert_without_examples_is_refused_with_the_way_out(quick: dict[str, Checkpoint], store: Store) -> None:
    experts = (expert(quick["stories-math"], MATH), expert(quick["script-code"], ()))
    with pytest.raises(RecipeError, match=r"give 5 to 10 under zoo\.models\.script-code\.examples"):
        build_composite("mix", experts, {}, RouterSection(), store, lambda one: pytest.fail("not asked"))
    assert not list(Path(store.root / "composites").iterdir())


def test_an_encoder_that_is_no_expert_is_refused(quick: dict[str, Checkpoint], store: Store) -> None:
    experts = (expert(quick["stories-math"], MATH), expert(quick["script-code"], CODE))
    with pytest.raises(RecipeError, match=r"mixture\.router\.encoder: 'gpt' is no expert"):
        build_composite("mix", experts, {}, RouterSection(encoder="gpt"), store, lambda one: pytest.fail("not asked"))
