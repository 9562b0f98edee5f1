"""Baselines, the verdict and the price of a search, on scores made up for it and on real merges."""

from pathlib import Path

import pytest

from composer.artefacts import Store
from composer.clustering import Cluster
from composer.evaluation.baselines import ORACLE, RANDOM, average_of, without_a_router
from composer.evaluation.evidence import Subject, weigh_evidence
from composer.evaluation.in_process import score_checkpoint
from composer.evaluation.settings import EvaluateSection
from composer.evaluation.tasks import split_of
from composer.executors import LocalExecutor
from composer.merging.averages import is_average, uniform_averages
from composer.merging.cost import SearchCost
from composer.merging.judge import Bench, Judge
from composer.merging.merge import merge_cluster
from composer.merging.plan import MergeOutcome, MergePlan, MergeStep
from composer.merging.settings import MergeSection
from composer.merging.strategies import STRATEGIES
from composer.merging.trials import TrialLog
from composer.merging.workbench import Workbench
from composer.probes import ProbesSection
from composer.zoo import Checkpoint, Zoo
from tests.conftest import QUICKSTART
from tests.test_evaluation import scores

MEMBERS = ("stories-math", "stories-science", "stories-web")
EVALUATE = EvaluateSection(
    tasks=["quick_math", "quick_web"],
    include=str(QUICKSTART / "tasks"),
    proxy_limit=16,
    held_out_limit=16,
    batch_size=32,
)


@pytest.fixture
def executor(store: Store) -> LocalExecutor[Judge]:
    return LocalExecutor(lambda: Judge(EVALUATE, ProbesSection(limit=4), store.root))


def cluster(*members: str) -> Cluster:
    return Cluster(id="cluster-1", members=members, representative=members[0], reason="a test")


def test_random_routing_is_the_mean_of_the_experts_item_by_item_and_the_oracle_the_best_of_each_task() -> None:
    a = scores("a", t=[1, 0, 1, 0], u=[0, 0, 0, 1])
    b = scores("b", t=[0, 0, 0, 1], u=[1, 1, 0, 1])
    rows = {one.role: one.scores for one in without_a_router([a, b])}
    assert list(rows["random"].task("t").items.values()) == [0.5, 0, 0.5, 0.5]
    assert rows["random"].mean == pytest.approx((a.mean + b.mean) / 2)
    assert rows["oracle"].task("t") == a.task("t")
    assert rows["oracle"].task("u") == b.task("u")
    assert without_a_router([a]) == []


def test_references_stand_apart_are_compared_and_spoken_of() -> None:
    good, bad = [1.0] * 90 + [0.0] * 10, [1.0, 0.0] * 50
    experts = [scores("one", t=good, u=bad), scores("two", t=bad, u=good)]
    average = scores(average_of("cluster-1"), t=bad, u=bad)
    others = [Subject(role="source", scores=one) for one in experts]
    others += [Subject(role="average", scores=average), *without_a_router(experts)]
    evidence = weigh_evidence(scores("mix", t=good, u=good), others, notes=("the uniform average of c is m",))
    names = [one.scores.subject for one in evidence.subjects]
    assert names[:3] == ["mix", "one", "two"], "models first, whatever else scores"
    assert set(names[3:]) == {average_of("cluster-1"), RANDOM, ORACLE}
    gaps = {one.other: one for one in evidence.differences}
    assert set(gaps) == set(names[1:])
    assert gaps[ORACLE].mean == 0
    assert gaps[RANDOM].low > 0
    assert evidence.best_single == "one", "what is no model is no best single model"
    beaten, even = (
        evidence.verdict.split(words)[1].split("). ")[0] for words in (" It beats ", " It cannot be told from ")
    )
    assert "the uniform average of cluster-1 (+0.400" in beaten
    assert "random routing over its experts (+0.200" in beaten
    assert even.startswith("the best expert for each task, chosen in hindsight (+0.000")
    assert "scores below one on no task" in evidence.verdict
    assert evidence.verdict.endswith("The uniform average of c is m.")


def test_where_it_loses_is_told_from_where_it_may_be_noise() -> None:
    half = [1.0, 0.0] * 50
    best = scores("best", lost=[1.0] * 100, near=[*half[:-1], 1.0], won=[0.0] * 100)
    mine = scores("mix", lost=half, near=half, won=[1.0] * 100)
    evidence = weigh_evidence(mine, [Subject(role="source", scores=best)])
    gaps = {one.task: one for one in evidence.by_task}
    assert gaps["lost"].mean == pytest.approx(-0.5)
    assert -0.62 < gaps["lost"].low < -0.5 < gaps["lost"].high < -0.38
    assert gaps["near"].low < 0 <= gaps["near"].high
    assert gaps["won"].low == 1
    assert "loses to best on lost (-0.500" in evidence.verdict
    assert "below best, within noise, on near (-0.010" in evidence.verdict
    assert "won (" not in evidence.verdict


def test_the_uniform_average_scores_what_it_would_if_it_were_written(
    executor: LocalExecutor[Judge], quick: dict[str, Checkpoint], store: Store
) -> None:
    zoo, section = Zoo(members=tuple(quick[name] for name in MEMBERS)), MergeSection()
    [found], notes = uniform_averages([cluster(*MEMBERS), cluster("stories-law")], [], zoo, section, executor)
    assert notes == ()
    assert found.subject == "uniform average of cluster-1"
    assert found.split == "held_out"
    assert not (store.root / "merged").exists(), "nothing but scores is kept"
    step = MergeStep(name="written", operator="linear", inputs=MEMBERS, parameters={"weight": 1.0})
    [(written, _)] = executor.map("keep", [(step, list(zoo.members), Bench(base=None), "written")])
    assert found.tasks == score_checkpoint(written, split_of(EVALUATE, "held_out"), store).tasks
    assert found.tasks != score_checkpoint(zoo.members[0], split_of(EVALUATE, "held_out"), store).tasks
    averaged = step.model_copy(update={"name": found.subject})
    [again] = executor.map("rate", [(averaged, list(zoo.members), Bench(base=None), "held_out")])
    assert again.scores == found
    assert again.merge_seconds == 0, "known, not made anew"


def test_an_average_that_cannot_be_made_is_told(executor: LocalExecutor[Judge], quick: dict[str, Checkpoint]) -> None:
    zoo = Zoo(members=(quick["stories-math"], quick["script-code"]))
    found, [note] = uniform_averages([cluster(*zoo.ids)], [], zoo, MergeSection(), executor)
    assert found == []
    assert note.startswith("the uniform average of cluster-1 cannot be made: ")


def test_an_average_that_was_found_is_not_made_again(quick: dict[str, Checkpoint]) -> None:
    third = round(1 / 3, 12)
    same = MergeOutcome(
        cluster="cluster-1",
        result=quick["stories"].renamed("merged-1"),
        merged=MEMBERS,
        whole=(),
        weights={**dict.fromkeys(MEMBERS, third), "stories": 0.0},
    )
    assert is_average(same, cluster(*MEMBERS))
    assert not is_average(same, cluster(*MEMBERS, "stories-law")), "one member is not in it"
    assert not is_average(same.model_copy(update={"weights": {}}), cluster(*MEMBERS)), "no weighted sum"
    zoo = Zoo(members=tuple(quick[name] for name in MEMBERS))
    nobody: LocalExecutor[Judge] = LocalExecutor(lambda: pytest.fail("made again"))
    found, notes = uniform_averages([cluster(*MEMBERS)], [same], zoo, MergeSection(), nobody)
    assert (found, notes) == ([], ("the uniform average of cluster-1 is merged-1 itself",))


def test_a_search_is_priced_the_same_when_it_carries_on(
    executor: LocalExecutor[Judge], quick: dict[str, Checkpoint], tmp_path: Path
) -> None:
    section = MergeSection(strategy="average", accept="always", early_stopping=False)
    plan: MergePlan = STRATEGIES.get("average").plan(cluster(*MEMBERS), section)
    split = split_of(EVALUATE, "proxy")

    def outcome() -> MergeOutcome:
        bench = Workbench(
            zoo=Zoo(members=tuple(quick[name] for name in MEMBERS)),
            cluster="cluster-1",
            section=section,
            executor=executor,
            log=TrialLog(tmp_path / "trials.sqlite"),
            proxy={items.name: items.hashes for items in split.tasks},
            fingerprint=split.fingerprint,
        )
        return merge_cluster(plan, bench)

    first = outcome()
    assert (first.cost.tried, first.cost.failed, first.cost.kept, first.cost.models) == (2, 0, 1, 3)
    assert first.cost.items == 2 * split.size
    assert first.cost.score_seconds > 0
    assert first.result is not None
    assert first.cost.written_bytes == first.result.size_bytes > 0
    assert outcome().cost == first.cost
    assert SearchCost.total([first.cost, first.cost]).items == 4 * split.size
