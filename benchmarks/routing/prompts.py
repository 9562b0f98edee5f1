"""Real prompts by domain, without the templates of their data sets, from the folder COMPOSER_DATA names."""

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent
HUMANITIES = ("high_school_world_history", "philosophy", "world_religions", "jurisprudence", "moral_disputes",
              "high_school_european_history", "international_law", "prehistory", "logical_fallacies",
              "high_school_us_history")  # fmt: skip
SOCIETY = ("high_school_psychology", "sociology", "high_school_macroeconomics", "marketing", "management",
           "high_school_geography", "public_relations", "us_foreign_policy", "human_sexuality",
           "high_school_government_and_politics")  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """One request."""

    text: str
    domain: str
    source: str
    """The data set."""


def examples(count: int) -> dict[str, list[str]]:
    """Return so many example requests of each domain."""
    return {name: own["requests"][:count] for name, own in YAML(typ="safe").load(ROOT / "requests.yaml").items()}


def keywords(count: int) -> dict[str, list[str]]:
    """Return so many keywords of each domain."""
    return {name: own["keywords"][:count] for name, own in YAML(typ="safe").load(ROOT / "requests.yaml").items()}


def load(most: float = 1.0) -> list[Prompt]:
    """Return all prompts, those of the lowest hash first; `most` is the share of them that is taken."""
    found = []
    for source, (domain, count, read) in SOURCES.items():
        texts = sorted({text.strip() for text in read()}, key=_hash)
        found += [Prompt(text, domain, source) for text in texts[: round(count * most)]]
    return found


def labelled(per_source: int) -> list[Prompt]:
    """Return prompts that no other function gives, to learn from."""
    found = []
    for source, (domain, count, read) in SOURCES.items():
        if domain != UNNAMED:
            texts = sorted({text.strip() for text in read()}, key=_hash)
            found += [Prompt(text, domain, source) for text in texts[count : count + per_source]]
    return found


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _rows(name: str) -> list[dict[str, Any]]:
    folder = os.environ.get("COMPOSER_DATA")
    if not folder:
        sys.exit("set COMPOSER_DATA to the folder with the data sets as JSON lines")
    lines = (Path(folder) / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def _field(name: str, field: str, words: int = 1) -> Callable[[], Iterator[str]]:
    return lambda: (row[field] for row in _rows(name) if len(row[field].split()) >= words)


def _stem(name: str) -> Callable[[], Iterator[str]]:
    """Read questions in LLM-Adapters' format, without its template and without the choices."""

    def read() -> Iterator[str]:
        for row in _rows(name):
            question = row["instruction"].partition("\n\n")[0]
            yield re.sub(r"^Please choose the correct (answer|solution) to the question: ", "", question)

    return read


def _mmlu(subjects: tuple[str, ...]) -> Callable[[], Iterator[str]]:
    return lambda: (row["question"] for row in _rows("mmlu_test") if row["subject"] in subjects)


def _mbpp() -> Iterator[str]:
    return (row["text"] for row in _rows("mbpp") if 11 <= row["task_id"] <= 510)


def _play() -> Iterator[str]:
    for row in _rows("tinyshakespeare"):
        speech = row["text"].partition(":\n")[2]
        if len(speech.split()) >= 8:
            yield speech


def _wiki() -> Iterator[str]:
    return (row["text"] for row in _rows("wikitext2_test") if len(row["text"].split()) >= 20)


UNNAMED = "other"
SOURCES: dict[str, tuple[str, int, Callable[[], Iterator[str]]]] = {
    "gsm8k": ("math", 120, _field("gsm8k_test", "question")),
    "mbpp": ("code", 60, _mbpp),
    "humaneval": ("code", 60, _field("humaneval", "prompt")),
    "sst2": ("sentiment", 60, _field("sst2_dev", "sentence", 5)),
    "agnews": ("news", 60, _field("agnews_test", "sentence")),
    "arc_easy": ("science", 60, _stem("arc_easy_test")),
    "arc_challenge": ("science", 60, _stem("arc_challenge_test")),
    "openbookqa": ("science", 60, _stem("openbookqa_test")),
    "mmlu_humanities": ("knowledge", 60, _mmlu(HUMANITIES)),
    "mmlu_society": ("knowledge", 60, _mmlu(SOCIETY)),
    "shakespeare": ("fiction", 60, _play),
    "social_i_qa": (UNNAMED, 60, _stem("social_i_qa_test")),
    "wikitext2": (UNNAMED, 60, _wiki),
}
"""Domain, prompts, and where they come from; no example request names the domain `other`."""
