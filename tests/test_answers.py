"""Answers: what stands in them gives back what lm-eval says, and what it would say of others."""

import numpy as np
import pytest

from composer.artefacts import Store
from composer.evaluation.answers import FAR, AnswerTable, TaskAnswers
from composer.evaluation.in_process import answer_checkpoint, score_checkpoint
from composer.evaluation.live import prompts
from composer.evaluation.tasks import Split, load_split
from composer.zoo import Checkpoint
from tests.conftest import QUICKSTART

NAMES = ["quick_math", "quick_science"]


@pytest.fixture(scope="module")
def split() -> Split:
    return load_split(NAMES, "proxy", include=str(QUICKSTART / "tasks"), proxy=0.5, limit=12)


def test_answers_give_back_the_scores(split: Split, quick: dict[str, Checkpoint], store: Store) -> None:
    answers = [answer_checkpoint(quick[name], split, store) for name in ("stories-math", "stories-science")]
    for one in answers:
        scores = score_checkpoint(quick[one.subject], split, store)
        for task in scores.tasks:
            own = one.task(task.task)
            assert own is not None
            table = AnswerTable.of([own])
            assert list(own.likelihoods) == list(task.items)
            assert table.score(table.likelihoods[0]) == pytest.approx(list(task.items.values()), abs=1e-6)
    assert answer_checkpoint(quick["stories-math"], split, store) == answers[0], "kept"


def test_a_choice_is_scored_by_chance_between_what_it_is_scored_by_rank() -> None:
    own = TaskAnswers(
        task="t",
        metric="acc",
        likelihoods={"a": (-1.0, -1.0 - np.log(3), -50.0), "b": (-9.0, -1.0)},
        lengths={"a": (1.0,) * 3, "b": (1.0,) * 2},
        values={"a": (1.0, 0.0, 0.0), "b": (1.0, 0.0)},
    )
    table = AnswerTable.of([own])
    assert table.likelihoods.shape == (1, 2, 3)
    assert table.likelihoods[0, 1, 2] == FAR
    assert table.score(table.likelihoods[0]).tolist() == [1.0, 0.0]
    assert table.expected(table.likelihoods[0]) == pytest.approx([0.75, np.exp(-8) / (1 + np.exp(-8))])


def test_prompts_show_no_answer(split: Split) -> None:
    asked = prompts(split, 3)
    assert set(asked) == set(NAMES)
    for items in split.tasks:
        assert len(asked[items.name]) == 3
        for index, prompt in zip(items.indices, asked[items.name], strict=False):
            document = items.task.eval_docs[index]
            assert prompt.strip() == str(items.task.doc_to_text(document)).strip()
