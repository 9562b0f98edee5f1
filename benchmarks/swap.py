"""Swapping a candidate's weights into a living vLLM engine against starting an engine on them.

    python benchmarks/swap.py MODEL MODEL [--repeats 5] [--dtype float32]

The models must be of one shape. A start counts from nothing to the first answer; swaps are from files on the disk,
from files in memory, and from tensors, which are written to memory first. After every swap the answers to the same
prompts, long ones that were cached before among them, are compared with those of an engine that was started on the
same weights. Prints one JSON object for each way, medians over repeats.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import AutoTokenizer

from composer.artefacts import Store
from composer.serving.swap import LivingEngine, berth
from composer.zoo import Checkpoint, inspect_checkpoint

PROMPTS = ("Once upon a time", "The answer to 3 + 4 is", "In the news today, the president said that he would. " * 20)
AFTER = " and then they went home."


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs=2, type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        room = Path(directory)
        first, second = (inspect_checkpoint(path.name, path, Store(room)) for path in options.models)
        limit = min(512, *(one.context_length or 512 for one in (first, second)))
        fresh, starts = {}, []
        for one in (first, second):
            began = time.monotonic()
            with LivingEngine(one, room / "fresh.log", dtype=options.dtype, max_model_len=limit) as engine:
                fresh[one.id] = answers(engine, one)
                starts.append(time.monotonic() - began)
        print(json.dumps({"way": "start", "seconds": seconds(starts)}), flush=True)
        with LivingEngine(first, room / "engine.log", dtype=options.dtype, max_model_len=limit) as engine:
            ways: dict[str, Callable[[Checkpoint], float]] = {
                "swap from disk": lambda one: timed(lambda: engine.swap(Path(one.path))),
                "swap from memory": lambda one: from_memory(engine, one),
                "swap of tensors": lambda one: of_tensors(engine, one),
            }
            for way, swap in ways.items():
                taken, equal, apart = [], 0, 0.0
                for turn in range(2 * options.repeats):
                    one = (second, first)[turn % 2]
                    answers(engine, one)
                    taken.append(swap(one))
                    scores, texts = answers(engine, one)
                    equal += texts == fresh[one.id][1]
                    apart = max(apart, *(abs(a[0] - b[0]) for a, b in zip(scores, fresh[one.id][0], strict=True)))
                figures = {"seconds": seconds(taken), "equal": equal, "of": len(taken), "largest_difference": apart}
                print(json.dumps({"way": way, **figures}), flush=True)


def from_memory(engine: LivingEngine, one: Checkpoint) -> float:
    """Swap from files that are in memory already; return seconds."""
    with berth(one.size_bytes) as directory:
        for file in Path(one.path).glob("*.safetensors"):
            shutil.copy(file, directory)
        return timed(lambda: engine.swap(directory))


def of_tensors(engine: LivingEngine, one: Checkpoint) -> float:
    """Swap tensors that are at hand; return seconds."""
    tensors = {}
    for file in Path(one.path).glob("*.safetensors"):
        tensors |= {name: tensor.clone() for name, tensor in load_file(file).items()}
    return timed(lambda: engine.load(tensors))


def answers(engine: LivingEngine, one: Checkpoint) -> Any:
    """Return what an engine says: likelihoods, and what it writes."""
    tokenizer = AutoTokenizer.from_pretrained(one.path)
    prompts = [tuple(tokenizer.encode(text))[-200:] for text in PROMPTS]
    after = tuple(tokenizer.encode(AFTER, add_special_tokens=False))
    return engine.score([(prompt, after) for prompt in prompts]), engine.complete(prompts, 32)


def timed(act: Callable[[], None]) -> float:
    """Return how long something takes, in seconds."""
    began = time.monotonic()
    act()
    return time.monotonic() - began


def seconds(values: list[float]) -> dict[str, float]:
    """Return the middle and both ends."""
    return {"median": round(statistics.median(values), 3), "from": round(min(values), 3), "to": round(max(values), 3)}


if __name__ == "__main__":
    main()
