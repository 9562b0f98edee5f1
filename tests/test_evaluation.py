"""Evaluation: splits that never meet, scores that are lm-eval's own, intervals that mean something."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from composer.artefacts import Store
from composer.errors import EvaluationError
from composer.evaluation.evidence import Subject, weigh_evidence
from composer.evaluation.in_process import answer_checkpoint, score_checkpoint
from composer.evaluation.scores import Scores, TaskScore
from composer.evaluation.statistics import paired_gain, paired_interval
from composer.evaluation.tasks import load_split
from composer.zoo import Checkpoint
from tests.conftest import QUICKSTART

TASKS = str(QUICKSTART / "tasks")


def texts(split: str, **options: object) -> list[str]:
    """The documents of a split, as text."""
    loaded = load_split(["quick_math"], split, include=TASKS, **options)  # type: ignore[arg-type]
    items = loaded.tasks[0]
    documents = list(items.task.eval_docs)
    return [json.dumps(documents[index], sort_keys=True) for index in items.indices]


def test_own_splits_are_used_and_do_not_meet() -> None:
    proxy, held_out = texts("proxy"), texts("held_out")
    assert proxy
    assert held_out
    assert not set(proxy) & set(held_out)
    lines = (QUICKSTART / "tasks/data/math_proxy.jsonl").read_text().splitlines()
    assert {json.loads(text)["context"] for text in proxy} == {json.loads(line)["context"] for line in lines}


@pytest.fixture
def one_split(tmp_path: Path) -> Path:
    """A task that has a test split only."""
    rows = [{"context": f"{i} is", "choices": ["odd", "even"], "answer": (i + 1) % 2} for i in range(200)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "mine.py").write_text(
        "import json, datasets\nfrom pathlib import Path\n"
        "def load(**_):\n    rows = json.loads(Path(__file__).with_name('rows.json').read_text())\n"
        "    return {'test': datasets.Dataset.from_list(rows)}\n"
    )
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ncustom_dataset: !function mine.load\noutput_type: multiple_choice\ntest_split: test\n"
        'doc_to_text: "{{context}}"\ndoc_to_choice: choices\ndoc_to_target: answer\n'
        "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    )
    return tmp_path


def test_a_single_split_is_divided_by_hash(one_split: Path) -> None:
    def hashes(split: str, **options: object) -> set[str]:
        loaded = load_split(["mine"], split, include=str(one_split), **options)  # type: ignore[arg-type]
        return set(loaded.tasks[0].hashes)

    proxy, held_out = hashes("proxy", proxy=0.3), hashes("held_out", proxy=0.3)
    assert len(proxy) + len(held_out) == 200
    assert not proxy & held_out
    assert 35 <= len(proxy) <= 85
    rows = json.loads((one_split / "rows.json").read_text())
    (one_split / "rows.json").write_text(json.dumps(rows[::-1]))
    assert hashes("proxy", proxy=0.3) == proxy, "the order of the items must not matter"
    assert hashes("proxy", proxy=0.3, limit=5) < proxy
    assert len(hashes("proxy", proxy=0.3, limit=5)) == 5


def test_an_unknown_task_gets_the_nearest_name() -> None:
    with pytest.raises(EvaluationError, match="no task 'quick_maths'; did you mean 'quick_math'"):
        load_split(["quick_maths"], "proxy", include=TASKS)


def test_scores_are_those_of_lm_eval(quick: dict[str, Checkpoint], store: Store) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    checkpoint = quick["stories-math"]
    split = load_split(["quick_math"], "held_out", include=TASKS)
    ours = score_checkpoint(checkpoint, split, store)
    theirs = simple_evaluate(
        model="hf",
        model_args={"pretrained": checkpoint.path, "dtype": "float32"},
        tasks=["quick_math"],
        task_manager=TaskManager(include_path=TASKS),
        bootstrap_iters=0,
        device="cpu",
        batch_size=16,
    )
    assert ours.task("quick_math").mean == pytest.approx(theirs["results"]["quick_math"]["acc,none"])
    again = score_checkpoint(checkpoint.renamed("other-name"), split, store)
    assert again.tasks == ours.tasks
    assert again.subject == "other-name"


def test_what_was_answered_in_another_type_is_not_taken_for_the_same(
    quick: dict[str, Checkpoint], store: Store
) -> None:
    full, half = (load_split(["quick_math"], "held_out", include=TASKS, dtype=one) for one in (None, "bfloat16"))
    first, second = (answer_checkpoint(quick["stories-math"], one, store).task("quick_math") for one in (full, half))
    assert first is not None
    assert second is not None
    apart = np.abs([np.subtract(first.likelihoods[item], second.likelihoods[item]) for item in first.likelihoods])
    assert 0 < apart.mean() < 0.2


def scores(subject: str, **tasks: list[float]) -> Scores:
    return Scores(
        subject=subject,
        split="held_out",
        tasks=tuple(
            TaskScore(task=name, metric="acc", items={str(i): value for i, value in enumerate(values)})
            for name, values in tasks.items()
        ),
    )


def test_the_standard_error_is_the_textbooks() -> None:
    task = scores("m", t=[1, 0, 0, 1, 1]).tasks[0]
    assert task.mean == pytest.approx(0.6)
    assert task.standard_error == pytest.approx(np.std([1, 0, 0, 1, 1], ddof=1) / math.sqrt(5))


def test_the_paired_interval_covers_the_known_one() -> None:
    generator = np.random.default_rng(0)
    base = generator.random(400)
    first, second = scores("a", t=list(base + 0.1)), scores("b", t=list(base))
    assert paired_interval(first, second) == pytest.approx((0.1, 0.1, 0.1))
    noisy = scores("c", t=list(base + generator.normal(0.1, 1.0, 400)))
    mean, low, high = paired_interval(noisy, second)
    differences = np.array(list(noisy.tasks[0].items.values())) - base
    spread = differences.std(ddof=1) / 20
    assert mean == pytest.approx(differences.mean())
    assert low == pytest.approx(mean - 1.96 * spread, abs=0.02)
    assert high == pytest.approx(mean + 1.96 * spread, abs=0.02)
    assert paired_interval(noisy, second) == (mean, low, high), "the same seed gives the same interval"


def test_beating_takes_more_than_one_standard_error() -> None:
    even = scores("a", t=[1, 0] * 50)
    assert not paired_gain(even, even).beyond(1)
    assert paired_gain(scores("b", t=[1, 1, 1, 0] * 25), even).beyond(1)
    assert not paired_gain(scores("c", t=[1, 0] * 49 + [1, 1]), scores("d", t=[0, 1] * 49 + [1, 0])).beyond(1)


def test_tasks_count_as_often_as_their_weights_say() -> None:
    """A task that counts twice is as one that is there twice."""
    generator = np.random.default_rng(0)
    first, second = (
        {name: list(generator.random(40)) for name in ("a", "b")},
        {name: list(generator.random(40)) for name in ("a", "b")},
    )
    weighted = [scores(name, **own).weighted({"a": 2}) for name, own in (("x", first), ("y", second))]
    doubled = [scores(name, a=own["a"], again=own["a"], b=own["b"]) for name, own in (("x", first), ("y", second))]
    assert weighted[0].mean == pytest.approx(doubled[0].mean)
    assert paired_gain(*weighted).mean == pytest.approx(paired_gain(*doubled).mean)
    mean, low, high = paired_interval(*weighted)
    assert mean == pytest.approx(paired_gain(*weighted).mean)
    assert (high - low) / 2 == pytest.approx(1.96 * paired_gain(*weighted).error, rel=0.1)
    assert weighted[0].weighted({}).mean == scores("x", **first).mean
    assert [task.label for task in weighted[0].tasks] == ["a (×2)", "b"]


@pytest.mark.parametrize(
    ("composite", "words"),
    [(0.9, "beats the best single model"), (0.1, "is worse than"), (0.5, "cannot be told apart")],
)
def test_the_verdict_says_what_the_interval_says(composite: float, words: str) -> None:
    count = 200
    won = round(composite * count)
    other = [1.0, 0.0] * (count // 2)
    mine = other if composite == 0.5 else [1.0] * won + [0.0] * (count - won)
    evidence = weigh_evidence(
        scores("mix", t=mine),
        [
            Subject(role="source", scores=scores("one", t=other)),
            Subject(role="base", scores=scores("base", t=[1.0] * count)),
        ],
    )
    assert words in evidence.verdict
    assert evidence.best_single == "one", "the base is no source"
    assert [subject.scores.subject for subject in evidence.subjects] == ["mix", "base", "one"]
