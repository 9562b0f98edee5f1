"""The tasks of the training zoos, and the texts that its fine-tunes learn, from the folder COMPOSER_DATA names.

What a data set's own training file holds is learnt, what its test file holds is asked; a data set with one file only is
cut by the hash of the item. So nothing that is learnt is ever asked.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

QUESTION = "Question: {}\nAnswer:"
SENTIMENT = "{}\nQuestion: Is this sentence positive or negative?\nAnswer:"
TOPIC = "{}\nQuestion: Is this news about World, Sports, Business or Sci/Tech?\nAnswer:"
CODE = (
    "You are an expert Python programmer, and here is your task: {} Your code should pass these tests:\n\n{}\n[BEGIN]\n"
)
TOPICS = ("World", "Sports", "Business", "Sci/Tech")
LONGEST = 400
"""Characters of an answer, at most; what is longer is cut, so that small contexts hold it."""
HEADLINE = 120
"""Characters of a piece of news."""
ASKED = 240
"""The same of what is asked: a corpus is thousands of merges, each scored on all of it."""

Text = tuple[str, str]
"""What is read, and what is learnt or asked to follow."""


def rows(name: str) -> list[dict[str, Any]]:
    """Return the rows of one file of JSON lines."""
    folder = os.environ.get("COMPOSER_DATA")
    if not folder:
        raise ValueError("the environment variable COMPOSER_DATA is not set; it names the folder with the data sets")
    lines = (Path(folder) / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def asked(text: str) -> bool:
    """Return whether an item of a data set without splits is asked (a third) rather than learnt."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 3 == 0


def choices(row: dict[str, Any]) -> tuple[str, list[str], int]:
    """Return question, choices and the place of the right one of a row of LLM-Adapters' format."""
    question, _, rest = row["instruction"].partition("\n\n")
    question = re.sub(r"^Please choose the correct (answer|solution) to the question: ", "", question).strip()
    listed = rest.rpartition("\n\nAnswer format")[0]
    found = [one.strip() for one in re.split(r"\s*(?:Answer|Solution)\d+:\s*", listed) if one.strip()]
    return question, found, int(row["answer"][-1]) - 1


def _cut(text: str) -> str:
    return text.replace("\r\n", "\n").strip()[:LONGEST]


def _sst2(learnt: bool) -> Iterator[dict[str, Any]]:
    for row in rows("sst2_train" if learnt else "sst2_dev"):
        if len(row["sentence"].split()) >= 5:
            label = int(row["label"])
            yield {
                "text": SENTIMENT.format(row["sentence"].strip()),
                "choices": ["negative", "positive"],
                "label": label,
            }


def _agnews(learnt: bool) -> Iterator[dict[str, Any]]:
    for row in rows("agnews_dev" if learnt else "agnews_test"):
        label = TOPICS.index(row["label"])
        # A small model learns a headline's worth of news.
        yield {"text": TOPIC.format(row["sentence"][:HEADLINE]), "choices": list(TOPICS), "label": label}


def _questions(*names: str, cut: bool | None = None) -> Iterator[dict[str, Any]]:
    for name in names:
        for row in rows(name):
            question, found, label = choices(row)
            if cut is not None and asked(question) == cut:
                continue
            if 0 <= label < len(found) > 1:
                yield {"text": QUESTION.format(question), "choices": [_cut(one) for one in found], "label": label}


def _science(learnt: bool) -> Iterator[dict[str, Any]]:
    return (
        _questions("arc_easy_train", "arc_challenge_train", "openbookqa_train")
        if learnt
        else _questions("arc_easy_test")
    )


def _piqa(learnt: bool) -> Iterator[dict[str, Any]]:
    return _questions("piqa_test", cut=learnt)


def _social(learnt: bool) -> Iterator[dict[str, Any]]:
    return _questions("social_i_qa_test", cut=learnt)


def _math(learnt: bool) -> Iterator[dict[str, Any]]:
    for row in rows("gsm8k_train" if learnt else "gsm8k_test"):
        yield {"text": QUESTION.format(row["question"]), "answer": " " + _cut(row["answer"])}


def _code(learnt: bool) -> Iterator[dict[str, Any]]:
    for row in rows("mbpp"):
        if (11 <= row["task_id"] <= 510) != learnt:
            tests = "\n".join(row["test_list"][: None if learnt else 1])
            yield {"text": CODE.format(row["text"], tests[:LONGEST]), "answer": _cut(row["code"])}
    if learnt:
        for row in rows("code_alpaca_2k"):
            yield {"text": f"{row['instruction']}\n{row['input']}\n[BEGIN]\n", "answer": _cut(row["output"])}


def _play(learnt: bool) -> Iterator[dict[str, Any]]:
    lines = [row["text"] for row in rows("tinyshakespeare")]
    for start in range(0, len(lines) - 4, 4):
        if asked(lines[start]) != learnt:
            yield {"text": "\n\n".join(lines[start : start + 2])[-LONGEST:] + "\n\n", "answer": _cut(lines[start + 2])}


def _wiki(learnt: bool) -> Iterator[dict[str, Any]]:
    for row in rows("wikitext2_valid" if learnt else "wikitext2_test"):
        text = row["text"].strip()
        if len(text) > LONGEST:
            yield {"text": text[: LONGEST // 2], "answer": text[LONGEST // 2 : LONGEST]}


def _chat(learnt: bool) -> Iterator[dict[str, Any]]:
    for row in rows("alpaca_en_demo"):
        if asked(row["instruction"]) != learnt:
            yield {"text": QUESTION.format(f"{row['instruction']} {row['input']}".strip()[:LONGEST]),
                   "answer": " " + _cut(row["output"])}  # fmt: skip


DOMAINS = {
    "sst2": _sst2, "agnews": _agnews, "science": _science, "piqa": _piqa, "social": _social,
    "math": _math, "code": _code, "play": _play, "wiki": _wiki, "chat": _chat,
}  # fmt: skip


def texts(domain: str) -> list[Text]:
    """Return what a fine-tune for a domain learns."""
    found = []
    for row in DOMAINS[domain](True):
        answer = row["answer"] if "answer" in row else " " + row["choices"][row["label"]]
        found.append((row["text"], answer))
    return found


def load(domain: str, **_: Any) -> DatasetDict:
    """Return a domain's items, as lm-eval's `custom_dataset` wants them."""
    items = []
    for row in DOMAINS[domain](False):
        fits = len(row["text"]) <= ASKED and max(map(len, row.get("choices", [""]))) <= ASKED
        if fits and row.get("answer", "x").strip():
            items.append({**row, "answer": row["answer"][:ASKED]} if "answer" in row else row)
    return DatasetDict({"test": Dataset.from_list(items)})


def byte_likelihood(doc: dict[str, Any], results: Any) -> dict[str, float]:
    """Return exp of the mean log-likelihood per byte of the answer, 0..1."""
    likelihood = results[0][0] if isinstance(results[0], (tuple, list)) else results[0]
    return {"byte_likelihood": math.exp(likelihood / len(doc["answer"].encode()))}
