"""Read a quickstart task's JSON lines, which lie beside this file, wherever lm-eval is started."""

import json
from pathlib import Path

import datasets


def load(domain: str, **_: object) -> dict[str, datasets.Dataset]:
    """Return the three splits of one task, as lm-eval's ``custom_dataset`` wants them."""
    folder = Path(__file__).resolve().parent / "data"
    splits = {}
    for name, part in (("train", "train"), ("validation", "proxy"), ("test", "heldout")):
        with (folder / f"{domain}_{part}.jsonl").open(encoding="utf-8") as lines:
            splits[name] = datasets.Dataset.from_list([json.loads(line) for line in lines])
    return splits
