"""The judge: what it scores is what is kept, on real merges and real items."""

from functools import partial
from pathlib import Path

import pytest
import torch

from composer.artefacts import Store
from composer.evaluation.settings import EvaluateSection
from composer.evaluation.tasks import split_of
from composer.executors import LocalExecutor
from composer.merging.judge import Bench, Judge
from composer.merging.plan import MergeStep
from composer.merging.settings import MergeSection
from composer.merging.trials import TrialLog
from composer.merging.workbench import Workbench
from composer.probes import ProbesSection
from composer.zoo import Checkpoint, Zoo
from tests.conftest import QUICKSTART

MEMBERS = ("stories-math", "stories-science", "stories-web")
EVALUATE = EvaluateSection(
    tasks=["quick_math", "quick_web"], include=str(QUICKSTART / "tasks"), proxy_limit=24, batch_size=32
)


@pytest.fixture
def judge(store: Store) -> Judge:
    return Judge(EVALUATE, ProbesSection(limit=4), store.root)


def step(operator: str, names: tuple[str, ...] = MEMBERS, **parameters: object) -> MergeStep:
    return MergeStep(name=f"by-{operator}", operator=operator, inputs=names, parameters=parameters)  # type: ignore[arg-type]


@pytest.mark.parametrize("operator", ["linear", "ties", "dare_linear", "karcher", "fisher", "regmean"])
def test_a_trial_scores_what_the_kept_checkpoint_scores(
    operator: str, judge: Judge, quick: dict[str, Checkpoint]
) -> None:
    bench, inputs = Bench(base=quick["stories"], seed=2), [quick[name] for name in MEMBERS]
    other = judge.trial(step("linear", weight=[1.0, 0.0, 0.0]), inputs, bench, None)
    tried = judge.trial(step(operator), inputs, bench, None)
    kept, smoke = judge.keep(step(operator), inputs, bench, "kept")
    assert smoke.problem is None
    assert tried.scores is not None
    assert other.scores is not None
    again = judge.score(kept)
    assert tried.scores.tasks == again.tasks
    assert tried.scores.tasks != other.scores.tasks
    assert other.scores.tasks == judge.score(quick[MEMBERS[0]]).tasks, "all weight on one model is that model"


def test_trials_and_checkpoints_are_computed_in_the_type_that_is_asked_for(
    quick: dict[str, Checkpoint], store: Store
) -> None:
    judge = Judge(EVALUATE.model_copy(update={"dtype": "bfloat16"}), ProbesSection(limit=4), store.root)
    bench, inputs = Bench(base=quick["stories"], dtype="bfloat16"), [quick[name] for name in MEMBERS]
    tried = judge.trial(step("linear"), inputs, bench, None)
    assert tried.scores is not None
    kept, _ = judge.keep(step("linear"), inputs, bench, "kept")
    assert judge._live is not None
    assert {one.dtype for one in judge._live.model.parameters()} == {torch.bfloat16}
    assert tried.scores.tasks == judge.score(kept).tasks


def test_layers_of_another_number_get_a_model_of_their_own(judge: Judge, quick: dict[str, Checkpoint]) -> None:
    bench, inputs = Bench(base=None), [quick[name] for name in MEMBERS[:2]]
    before = judge.trial(step("linear", MEMBERS[:2]), inputs, bench, None)
    stacked = judge.trial(step("passthrough", MEMBERS[:2], first=[0, 1], last=[2, -1]), inputs, bench, None)
    after = judge.trial(step("linear", MEMBERS[:2]), inputs, bench, None)
    assert stacked.failure is None
    assert stacked.scores is not None
    assert before.scores == after.scores


def test_what_is_not_finite_has_failed_and_the_search_goes_on(
    judge: Judge, quick: dict[str, Checkpoint], store: Store
) -> None:
    split = split_of(EVALUATE, "proxy")
    bench = Workbench(
        zoo=Zoo(members=tuple(quick[name] for name in MEMBERS), base=quick["stories"]),
        cluster="cluster-1",
        section=MergeSection(),
        executor=LocalExecutor(lambda: judge),
        log=TrialLog(store.root / "trials.sqlite"),
        proxy={items.name: items.hashes for items in split.tasks},
        fingerprint=split.fingerprint,
    )
    huge = {"weight": [1e39, 1.0, 1.0], "normalize": False}
    wrong = {"wieght": 1.0}
    best = judge.score(quick[MEMBERS[0]])
    steps = [step("linear", **huge), step("linear"), step("linear", **wrong)]
    first, second, third = bench.race(steps, best, "racing")
    assert (first.scores, first.complete) == (None, False)
    assert "not finite" in str(first.measured.failure)
    assert "did you mean 'weight'" in str(third.measured.failure)
    assert second.scores is not None
    again = bench.race(steps, best, "racing")
    assert [one.measured for one in again] == [first.measured, second.measured, third.measured]
    bench.log.close()


def test_a_portion_costs_no_more_than_its_items(judge: Judge, quick: dict[str, Checkpoint]) -> None:
    bench, inputs = Bench(base=None), [quick[name] for name in MEMBERS]
    whole = judge.trial(step("linear"), inputs, bench, None).scores
    assert whole is not None
    items = list(whole.task("quick_web").items)[:5]
    part = judge.trial(step("linear"), inputs, bench, {"quick_web": tuple(items)}).scores
    assert part is not None
    [task] = part.tasks
    assert task.items == {item: whole.task("quick_web").items[item] for item in items}


def test_a_full_disk_ends_the_search_with_one_line(
    quick: dict[str, Checkpoint], small_disk: Path, tmp_path: Path
) -> None:
    from composer.errors import DiskFullError

    (small_disk / "ballast").write_bytes(b"0" * 900_000)
    judge = partial(Judge, EVALUATE, ProbesSection(limit=4), small_disk / "store")
    with pytest.raises(DiskFullError, match="no space left"):
        judge().keep(step("linear"), [quick[name] for name in MEMBERS], Bench(base=None), "kept")
    assert not list(small_disk.rglob("model*.safetensors"))
