"""Executors: the same results wherever calls run, and whatever dies meanwhile."""

import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from composer.artefacts import Store
from composer.clustering import Cluster
from composer.errors import EvaluationError, RecipeError
from composer.evaluation.settings import EvaluateSection
from composer.evaluation.tasks import split_of
from composer.executors import Executor, LocalExecutor, RayExecutor
from composer.merging.judge import Judge
from composer.merging.merge import merge_cluster
from composer.merging.plan import MergeOutcome
from composer.merging.settings import MergeSection
from composer.merging.strategies import STRATEGIES
from composer.merging.trials import TrialLog
from composer.merging.workbench import Workbench
from composer.probes import ProbesSection
from composer.progress import Progress, Step, silent
from composer.zoo import Checkpoint, Zoo
from tests.conftest import QUICKSTART

MEMBERS = ("stories-math", "stories-science", "stories-web")


class Worker:
    """Remembers where it runs."""

    def __init__(self, note: str) -> None:
        self.note = note
        self.calls = 0

    def double(self, value: int) -> tuple[str, int, int, int]:
        self.calls += 1
        if value < 0:
            raise EvaluationError(f"{value} is negative")
        time.sleep(0.01)
        return self.note, 2 * value, os.getpid(), self.calls


def test_local_calls_share_one_worker_made_on_first_use() -> None:
    made = []
    executor = LocalExecutor(lambda: made.append(1) or Worker("here"))  # type: ignore[func-returns-value]
    assert made == []
    results = list(executor.map("double", [(n,) for n in range(4)]))
    assert [(value, pid, calls) for _, value, pid, calls in results] == [(2 * n, os.getpid(), n + 1) for n in range(4)]
    with pytest.raises(EvaluationError, match="-1 is negative"):
        list(executor.map("double", [(-1,)]))
    executor.close()
    list(executor.map("double", [(1,)]))
    assert made == [1, 1]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A Ray cluster of a head without cores and two nodes with one each."""
    import ray
    from ray.cluster_utils import Cluster as RayCluster

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", f"{here.parent}:{here}")
    found = RayCluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    monkeypatch.setenv("RAY_ADDRESS", found.address)
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.mark.slow
def test_ray_brings_results_and_errors_back_in_order(cluster) -> None:  # type: ignore[no-untyped-def]
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    executor = RayExecutor(partial(Worker, "there"), workers=2)
    results = list(executor.map("double", [(n,) for n in range(12)]))
    assert [value for _, value, _, _ in results] == [2 * n for n in range(12)]
    assert len({pid for _, _, pid, _ in results}) == 2
    with pytest.raises(EvaluationError, match="-3 is negative"):
        list(executor.map("double", [(1,), (-3,)]))
    executor.close()


def test_a_cluster_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(RecipeError, match=r"executor 'ray': no cluster at 127\.0\.0\.1:1"):
        RayExecutor(partial(Worker, "nowhere"))


def search(executor: Executor[Judge], quick: dict[str, Checkpoint], store: Store, progress: Progress) -> MergeOutcome:
    """Search real merges on real items."""
    split = split_of(evaluate(), "proxy")
    section = MergeSection(strategy="coefficient", coefficients=[0.3, 0.5, 0.7])
    bench = Workbench(
        zoo=Zoo(members=tuple(quick[name] for name in MEMBERS), base=quick["stories"]),
        cluster="cluster-1",
        section=section,
        executor=executor,
        log=TrialLog(store.root / "trials.sqlite"),
        proxy={items.name: items.hashes for items in split.tasks},
        fingerprint=split.fingerprint,
        progress=progress,
    )
    one = Cluster(id="cluster-1", members=MEMBERS, representative=MEMBERS[0], reason="")
    return merge_cluster(STRATEGIES.get("coefficient").plan(one, section), bench)


def evaluate() -> EvaluateSection:
    include = str(QUICKSTART / "tasks")
    return EvaluateSection(tasks=["quick_math", "quick_web"], include=include, proxy_limit=24, batch_size=32)


@pytest.mark.slow
def test_a_search_ends_the_same_though_a_node_dies(cluster, quick: dict[str, Checkpoint], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    here = Store(tmp_path / "here")
    expected = search(LocalExecutor(partial(Judge, evaluate(), ProbesSection(), here.root)), quick, here, silent)
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    there = Store(tmp_path / "there")
    executor = RayExecutor(partial(Judge, evaluate(), ProbesSection(), there.root), workers=2)
    killed = []

    def kill_a_node(step: Step) -> None:
        if step.message.startswith("linear") and not killed:
            killed.append(nodes[0])
            cluster.add_node(num_cpus=1)
            cluster.remove_node(nodes[0], allow_graceful=False)

    outcome = search(executor, quick, there, kill_a_node)
    executor.close()
    assert killed
    assert outcome.trials == expected.trials
    assert outcome.weights == expected.weights
    assert (outcome.result and outcome.result.content_hash) == (expected.result and expected.result.content_hash)
    log = TrialLog(there.root / "trials.sqlite")
    assert log._base.execute("SELECT count(*) FROM trials").fetchone()[0] >= 6
    log.close()
