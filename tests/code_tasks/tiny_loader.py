"""A task of four functions, two in each split, and how a program is made of what a model writes."""

import datasets

TASKS = {
    "double": ("def double(x):\n    return", " 2 * x", "assert double(3) == 6"),
    "last": ("def last(items):\n    return", " items[-1]", "assert last([1, 2]) == 2"),
    "twice": ("def twice(text):\n    return", " text + text", "assert twice('ab') == 'abab'"),
    "first": ("def first(items):\n    return", " items[0]", "assert first([1, 2]) == 1"),
}


def load(**_: object) -> dict[str, datasets.Dataset]:
    """Return the splits."""
    rows = [{"name": name, "prompt": one[0], "solution": one[1], "test": one[2]} for name, one in TASKS.items()]
    return {"validation": datasets.Dataset.from_list(rows[:2]), "test": datasets.Dataset.from_list(rows[2:])}


def programs(answers: list[list[str]], documents: list[dict[str, str]]) -> list[list[str]]:
    """Put the prompt before every answer."""
    return [[document["prompt"] + one for one in own] for own, document in zip(answers, documents, strict=True)]
