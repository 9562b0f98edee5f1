"""What recording probes costs beyond running the model.

    COMPOSER_ZOO=DIR python benchmarks/probes.py [MODEL ...]

For each model (by default SmolLM2-135M-Instruct and five fine-tunes of it) the seconds of `record_probes` against those
of bare forward passes over the same texts in the same batches: model and tokenizer loaded, texts cut into tokens,
logits computed and dropped. Both in turn, medians of several rounds. Prints one JSON object.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from composer.artefacts import Store
from composer.probes import compare_records, load_texts, record_probes
from composer.probes.record import LOGITS_AT_ONCE, MOST_TEXTS_AT_ONCE
from composer.zoo import Checkpoint, inspect_checkpoint

NAMES = ("smollm2-135m-instruct", "smol-sst2", "smol-agnews", "smol-science", "smol-math", "smol-code")
ROUNDS = 2


def bare(checkpoint: Checkpoint, texts: tuple[str, ...]) -> float:
    """Return the seconds of forward passes alone, batched as probes are."""
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    cut = sorted((tokenizer(text)["input_ids"] for text in texts), key=len)
    batch: list[list[int]] = []
    batches = []
    for ids in cut:
        size = (len(batch) + 1) * len(ids) * (checkpoint.vocabulary_size or 1)
        if batch and (len(batch) == MOST_TEXTS_AT_ONCE or size > LOGITS_AT_ONCE):
            batches.append(batch)
            batch = []
        batch.append(ids)
    with torch.inference_mode():
        for rows in [*batches, batch]:
            longest = len(rows[-1])
            padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
            _ = model(input_ids=padded, attention_mask=mask, use_cache=False).logits
    return time.perf_counter() - began


def recorded(checkpoint: Checkpoint, texts: tuple[str, ...]) -> tuple[float, int]:
    """Return the seconds of a record and its bytes."""
    with tempfile.TemporaryDirectory() as directory:
        began = time.perf_counter()
        record = record_probes(checkpoint, texts, Store(Path(directory)))
        return time.perf_counter() - began, record.size_bytes


def main() -> None:
    """Measure and print."""
    zoo = os.environ.get("COMPOSER_ZOO")
    if not zoo:
        sys.exit("set COMPOSER_ZOO to the directory of the models")
    texts = load_texts("default", 64, 512)
    with tempfile.TemporaryDirectory() as directory:
        store = Store(Path(directory))
        models = [inspect_checkpoint(name, Path(zoo) / name, store) for name in sys.argv[1:] or NAMES]
        bare(models[0], texts[:4])
        ours, theirs, sizes = [], [], []
        for model in models:
            rounds = [(bare(model, texts), recorded(model, texts)) for _ in range(ROUNDS)]
            theirs.append(statistics.median(one for one, _ in rounds))
            ours.append(statistics.median(seconds for _, (seconds, _) in rounds))
            sizes.append(rounds[0][1][1])
        records = [(model, record_probes(model, texts, store)) for model in models]
        began = time.perf_counter()
        compare_records(records, store)
        pairs = time.perf_counter() - began
    print(
        json.dumps(
            {
                "models": len(models),
                "bare_forward_s": round(sum(theirs), 1),
                "record_s": round(sum(ours), 1),
                "ratio": round(sum(ours) / sum(theirs), 3),
                "record_mb": round(max(sizes) / 1e6, 1),
                "compare_all_pairs_s": round(pairs, 1),
                "threads": torch.get_num_threads(),
            }
        )
    )


if __name__ == "__main__":
    main()
