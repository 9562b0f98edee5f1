"""A search by vLLM: the same scores and the same winner as by torch, kept apart, and nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from composer.artefacts import Store
from composer.clustering import Cluster
from composer.errors import ServeError
from composer.evaluation.engine_model import EngineModel
from composer.evaluation.in_process import known_scores
from composer.evaluation.scorer import choose
from composer.evaluation.settings import EvaluateSection, Scorer
from composer.evaluation.tasks import load_split
from composer.executors import LocalExecutor
from composer.merging.judge import Bench, Judge
from composer.merging.merge import merge_cluster
from composer.merging.plan import MergeOutcome, MergeStep
from composer.merging.settings import MergeSection
from composer.merging.strategies import STRATEGIES
from composer.merging.trials import TrialLog, trial_key
from composer.merging.workbench import Workbench
from composer.planning import make_plan
from composer.probes import ProbesSection
from composer.recipe import Recipe
from composer.serving.engines.machine import has_gpu
from composer.serving.swap import MEMORY, berth
from composer.zoo import Checkpoint, Zoo
from tests.conftest import MODELS, QUICKSTART, ROOT, children, survivors
from tests.test_live_scoring import LIKELIHOODS, folder

__all__ = ["folder"]

MEMBERS = ("stories-math", "stories-science", "stories-web")
TASKS = [*LIKELIHOODS, "rolling", "told"]
QUICK = EvaluateSection(
    tasks=["quick_math", "quick_web"], include=str(QUICKSTART / "tasks"), proxy_limit=24, batch_size=32
)


def step(operator: str, names: tuple[str, ...] = MEMBERS, **parameters: object) -> MergeStep:
    return MergeStep(name=f"by-{operator}", operator=operator, inputs=names, parameters=parameters)  # type: ignore[arg-type]


CANDIDATES = [
    step("linear"),
    step("linear", weight=[0.7, 0.2, 0.1]),
    step("ties", density=0.5),
    step("dare_linear"),
]


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_without_a_gpu_auto_is_torch(quick: dict[str, Checkpoint]) -> None:
    assert QUICK.scorer == "auto"
    assert choose(QUICK, [quick["stories"]]) == "torch"


def test_with_a_gpu_auto_is_vllm_where_it_knows_the_model(
    quick: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vllm")
    monkeypatch.setattr("composer.evaluation.scorer.has_gpu", lambda: True)
    own_code = quick["script"].model_copy(update={"remote_code": True})
    assert choose(QUICK, [quick["stories"], quick["script"]]) == "vllm"
    assert choose(QUICK, [quick["stories"], own_code]) == "torch"
    assert choose(QUICK.model_copy(update={"scorer": "torch"}), [quick["stories"]]) == "torch"


def test_what_vllm_cannot_run_is_refused_with_one_line(quick: dict[str, Checkpoint]) -> None:
    pytest.importorskip("vllm")
    wanted = QUICK.model_copy(update={"scorer": "vllm"})
    own_code = quick["script"].model_copy(update={"remote_code": True})
    assert choose(wanted, [quick["stories"]]) == "vllm"
    with pytest.raises(ServeError, match=r"'script': the model brings Python code .*; evaluate.scorer=torch") as error:
        choose(wanted, [quick["stories"], own_code])
    assert "\n" not in str(error.value)


def test_a_plan_without_vllm_says_so_before_anything_is_made(
    quick: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # what an import system says of a module that is not there
    document = {"name": "x", "zoo": {"models": [{"id": name, "model": quick[name].path} for name in MEMBERS]}}
    members = tuple(quick[name] for name in MEMBERS)
    zoo, cluster = (
        Zoo(members=members, base=None, examples={}),
        Cluster(id="cluster-1", members=MEMBERS, representative=MEMBERS[0], reason="a test"),
    )

    def plan(scorer: str, strategy: str = "average") -> None:
        evaluate = QUICK.model_copy(update={"scorer": scorer}).model_dump(mode="json")
        recipe = Recipe.model_validate({**document, "merge": {"strategy": strategy}, "evaluate": evaluate})
        make_plan(recipe, zoo, (cluster,), proxy_items=8, held_out_items=8)

    plan("torch")
    plan("vllm", strategy="none")
    with pytest.raises(ServeError, match=r"scorer is vllm, but vLLM is not installed.*evaluate\.scorer=torch"):
        plan("vllm")


def test_scores_by_vllm_are_kept_apart(quick: dict[str, Checkpoint], store: Store) -> None:
    inputs = [quick[name] for name in MEMBERS]
    benches = [Bench(base=quick["stories"], scorer=scorer) for scorer in ("torch", "vllm")]
    assert len({trial_key(step("linear"), inputs, bench, "items") for bench in benches}) == 2
    split = Judge(QUICK, ProbesSection(limit=4), store.root).split("proxy")
    assert known_scores(inputs[0], split, store) == known_scores(inputs[0], split, store, "torch")
    assert known_scores(inputs[0], split, store) != known_scores(inputs[0], split, store, "vllm")


def test_an_engine_is_not_asked_for_more_than_greedy_decoding() -> None:
    engine = SimpleNamespace(config=AutoConfig.from_pretrained(MODELS / "stories"))
    model = EngineModel(engine, AutoTokenizer.from_pretrained(MODELS / "stories"))  # type: ignore[arg-type]
    row = torch.ones((1, 3), dtype=torch.long)
    for settings, name in (({"do_sample": True, "temperature": 0.7}, "do_sample"), ({"num_beams": 4}, "num_beams")):
        with pytest.raises(ServeError, match=f"generates with '{name}'"):
            model._model_generate(row, 8, [], attention_mask=row, **settings)


def test_an_executor_closes_its_worker() -> None:
    closed = []
    executor = LocalExecutor(lambda: SimpleNamespace(ask=lambda: 1, close=lambda: closed.append(1)))
    executor.close()
    assert list(executor.map("ask", [()])) == [1]
    executor.close()
    executor.close()
    assert closed == [1]


@pytest.mark.skipif(not os.access(MEMORY, os.W_OK), reason="needs a file system in memory")
def test_weights_of_a_process_that_was_killed_do_not_stay_in_memory() -> None:
    script = (
        "import time\nfrom composer.serving.swap import berth\nwith berth(1) as d: print(d, flush=True); time.sleep(99)"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as held:
        assert held.stdout is not None
        left = Path(held.stdout.readline().strip())
        os.utime(left, (time.time() - 999,) * 2)
        with berth(1):
            assert left.is_dir(), "somebody is in it"
        os.kill(held.pid, signal.SIGKILL)
    assert left.is_dir()
    with berth(1):
        assert not left.exists()


def judge_of(folder: Path, store: Store) -> Judge:
    """A judge of all kinds of requests."""
    split = load_split(TASKS, "proxy", include=str(folder), proxy=1.0)
    return Judge(EvaluateSection(tasks=TASKS), ProbesSection(limit=4), store.root, {"proxy": split})


@pytest.fixture(scope="module")
def judges(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Judge, Judge]]:
    """One that is asked for torch and one that is asked for vLLM."""
    pytest.importorskip("vllm")
    both = judge_of(folder, Store(tmp_path_factory.mktemp("t"))), judge_of(folder, Store(tmp_path_factory.mktemp("v")))
    yield both
    for one in both:
        one.close()


def answers(judge: Judge) -> list[tuple[str, float | str]]:
    """What the last trial found for every request, each with its task."""
    scorer = judge._swapped._scorer if judge._swapped else judge._scorer
    assert scorer is not None
    found = [
        (task, answer)
        for task, items in scorer._requests.items()
        for own in items.values()
        for request in own
        for answer in request.resps
    ]
    return [(task, one if isinstance(one, (str, float)) else one[0]) for task, one in found]


def close(task: str) -> float:
    """How far log-likelihoods may be apart: what is too long for the model loses two tokens more in an engine."""
    return 1.0 if task == "long" else 1e-3


@pytest.mark.slow
def test_both_score_the_same(judges: tuple[Judge, Judge], quick: dict[str, Checkpoint]) -> None:
    inputs, found, engines = [quick[name] for name in MEMBERS], [], set()
    for candidate in CANDIDATES:
        texts = []
        for judge, scorer in zip(judges, ("torch", "vllm"), strict=True):
            measured = judge.trial(candidate, inputs, Bench(base=quick["stories"], scorer=scorer), None)
            assert measured.scores is not None, measured.failure
            texts.append(answers(judge))
            found.append(measured.scores)
        engines.add(engine_of(judges[1]))
        for (task, ours), (_, theirs) in zip(*texts, strict=True):
            assert ours == (theirs if isinstance(theirs, str) else pytest.approx(theirs, abs=close(task))), task
        for mine, other in zip(found[-2].tasks, found[-1].tasks, strict=True):
            exact = mine.metric != "likelihood"
            assert mine.items == (other.items if exact else pytest.approx(other.items, abs=1e-3)), mine.task
        assert len({one for _, one in texts[0] if isinstance(one, str)}) > 1, "else nothing was generated"
    assert len({one.model_dump_json(exclude={"subject"}) for one in found[::2]}) == len(CANDIDATES)
    assert len(engines) == 1, "all in one engine"


def engine_of(judge: Judge) -> int:
    assert judge._swapped is not None
    assert judge._swapped._engine is not None
    assert judge._swapped._engine._child is not None
    return judge._swapped._engine._child.process.pid


@pytest.mark.slow
def test_what_is_kept_scores_what_was_tried_and_members_share_the_engine(
    judges: tuple[Judge, Judge], quick: dict[str, Checkpoint]
) -> None:
    _, judge = judges
    bench, inputs = Bench(base=quick["stories"], scorer="vllm"), [quick[name] for name in MEMBERS]
    tried = judge.trial(CANDIDATES[2], inputs, bench, None)
    engine = engine_of(judge)
    kept, _ = judge.keep(CANDIDATES[2], inputs, bench, "kept")
    assert tried.scores is not None
    assert judge.score(kept, "proxy", "vllm").tasks == tried.scores.tasks
    alone = judge.trial(step("linear", weight=[1.0, 0.0, 0.0]), inputs, bench, None)
    assert alone.scores is not None
    assert judge.score(inputs[0], "proxy", "vllm").tasks == alone.scores.tasks
    assert engine_of(judge) == engine
    assert known_scores(inputs[0], judge.split("proxy"), judge.store, "vllm").is_file()
    assert not known_scores(inputs[0], judge.split("proxy"), judge.store).is_file()


@pytest.mark.slow
def test_what_is_not_finite_has_failed_and_other_shapes_get_an_engine_of_their_own(
    judges: tuple[Judge, Judge], quick: dict[str, Checkpoint]
) -> None:
    _, judge = judges
    bench, inputs = Bench(base=None, scorer="vllm"), [quick[name] for name in MEMBERS]
    before = judge.trial(step("linear"), inputs, bench, None)
    huge = judge.trial(step("linear", weight=[1e39, 1.0, 1.0], normalize=False), inputs, bench, None)
    assert (huge.scores, "not finite" in str(huge.failure)) == (None, True)
    assert judge.trial(step("linear"), inputs, bench, None).scores == before.scores
    engine = engine_of(judge)
    stacked = judge.trial(step("passthrough", MEMBERS[:2], first=[0, 1], last=[2, -1]), inputs[:2], bench, None)
    assert stacked.scores is not None, stacked.failure
    assert engine_of(judge) != engine
    assert not psutil.pid_exists(engine)


@pytest.mark.slow
def test_an_engine_that_dies_says_so_and_another_one_takes_its_place(
    judges: tuple[Judge, Judge], quick: dict[str, Checkpoint]
) -> None:
    _, judge = judges
    bench, inputs = Bench(base=None, scorer="vllm"), [quick[name] for name in MEMBERS]
    before = judge.trial(step("linear"), inputs, bench, None)
    family = children(engine_of(judge))
    for process in family:
        process.kill()
    line = r"the engine of '.*' died; the log says why: .*\.log; evaluate.scorer=torch does without vLLM"
    with pytest.raises(ServeError, match=line) as error:
        judge.trial(step("linear"), inputs, bench, None)
    assert "\n" not in str(error.value)
    assert not survivors(family)
    assert judge.trial(step("linear"), inputs, bench, None).scores == before.scores


@pytest.mark.slow
def test_a_search_finds_the_same_winner_and_leaves_nothing_behind(quick: dict[str, Checkpoint], tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    outcomes = {}
    for scorer in ("torch", "vllm"):
        store = Store(tmp_path / scorer)
        executor = LocalExecutor(partial(Judge, QUICK, ProbesSection(limit=4), store.root))
        before = children(os.getpid())
        outcomes[scorer] = search(executor, quick, store, scorer)  # type: ignore[arg-type]
        started = [one for one in children(os.getpid()) if one not in before]
        assert bool(started) == (scorer == "vllm")
        executor.close()
        assert not survivors(started)
        assert not list(MEMORY.glob("composer-berth-*"))
        assert not list(store.root.glob("scorer-*"))
    torch_s, vllm_s = outcomes.values()
    assert vllm_s.result is not None
    assert torch_s.result is not None
    assert vllm_s.result.content_hash == torch_s.result.content_hash
    assert vllm_s.weights == torch_s.weights
    for mine, other in zip(vllm_s.trials, torch_s.trials, strict=True):
        assert (mine.step, mine.accepted) == (other.step, other.accepted)


def search(executor: LocalExecutor[Judge], quick: dict[str, Checkpoint], store: Store, scorer: Scorer) -> MergeOutcome:
    """Search real merges on real items."""
    split = Judge(QUICK, ProbesSection(limit=4), store.root).split("proxy")
    section = MergeSection(strategy="coefficient", coefficients=[0.3, 0.5, 0.7], accept="always")
    log = TrialLog(store.root / "trials.sqlite")
    bench = Workbench(
        zoo=Zoo(members=tuple(quick[name] for name in MEMBERS), base=quick["stories"]),
        cluster="cluster-1",
        section=section,
        executor=executor,
        log=log,
        proxy={items.name: items.hashes for items in split.tasks},
        fingerprint=split.fingerprint,
        scorer=scorer,
    )
    one = Cluster(id="cluster-1", members=MEMBERS, representative=MEMBERS[0], reason="")
    outcome = merge_cluster(STRATEGIES.get("coefficient").plan(one, section), bench)
    log.close()
    return outcome
