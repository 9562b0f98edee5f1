"""Loads the real data sets of recipes/smollm2.yaml from the folder that COMPOSER_DATA names."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

LABELS = {"0": 0, "1": 1, "World": 0, "Sports": 1, "Business": 2, "Sci/Tech": 3}


def _rows(name: str) -> list[dict[str, Any]]:
    folder = os.environ.get("COMPOSER_DATA")
    if not folder:
        raise ValueError("the environment variable COMPOSER_DATA is not set; it names the folder with the data sets")
    file = Path(folder) / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def _test(rows: list[dict[str, Any]]) -> DatasetDict:
    return DatasetDict({"test": Dataset.from_list(rows)})


def sst2(**_: Any) -> DatasetDict:
    """SST-2 phrases of at least five words, label 0 negative, 1 positive."""
    rows = [
        {"sentence": row["sentence"].strip(), "label": LABELS[str(row["label"])]}
        for row in _rows("sst2_dev")
        if len(row["sentence"].split()) >= 5
    ]
    return _test(rows)


def agnews(**_: Any) -> DatasetDict:
    """AG News: World, Sports, Business or Sci/Tech."""
    return _test([{"sentence": row["sentence"], "label": LABELS[row["label"]]} for row in _rows("agnews_test")])


def arc_easy(**_: Any) -> DatasetDict:
    """ARC-Easy with open answers: the text of the right choice against the others."""
    return _choices("arc_easy_test")


def openbookqa(**_: Any) -> DatasetDict:
    """OpenBookQA, in the same form."""
    return _choices("openbookqa_test")


def _choices(name: str) -> DatasetDict:
    rows = []
    for row in _rows(name):
        question, _, rest = row["instruction"].partition("\n\n")
        question = question.removeprefix("Please choose the correct answer to the question: ").strip()
        listed = rest.partition("\n\n")[0]
        choices = [choice.strip() for choice in re.split(r"\s*Answer\d+:\s*", listed) if choice.strip()]
        answer = int(row["answer"].removeprefix("answer")) - 1
        if 0 <= answer < len(choices):
            rows.append({"question": question, "choices": choices, "label": answer})
    return _test(rows)


def gsm8k(**_: Any) -> DatasetDict:
    """GSM8K: the worked answer, without calculator annotations' effect on the question."""
    return _test([{"question": row["question"], "answer": row["answer"]} for row in _rows("gsm8k_test")])


def mbpp(**_: Any) -> DatasetDict:
    """MBPP's test split, ids 11 to 510."""
    rows = [
        {
            "text": row["text"],
            "tests": "\n".join(row["test_list"]),
            "code": row["code"].replace("\r\n", "\n").strip() + "\n[DONE]",
        }
        for row in _rows("mbpp")
        if 11 <= row["task_id"] <= 510
    ]
    return _test(rows)


def byte_likelihood(doc: dict[str, Any], results: Any) -> dict[str, float]:
    """Return exp of the mean log-likelihood per byte of the answer, 0..1.

    Per byte, not per token, so that models with different tokenizers can be compared.
    """
    likelihood = results[0][0] if isinstance(results[0], (tuple, list)) else results[0]
    answer = doc.get("answer") or doc["code"]
    return {"byte_likelihood": math.exp(likelihood / len(f" {answer}".encode()))}
