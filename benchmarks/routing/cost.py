"""What a decision costs, beside how often it is right: accuracy against milliseconds and memory.

    COMPOSER_ZOO=DIR COMPOSER_DATA=DIR python benchmarks/routing/cost.py [--encoder NAME]

Depths and tables are measured one after another, each in a process of its own on one core: the time to route a prompt
of 100 tokens (median of 30), and how far the process's resident memory grew beyond the tokenizer. The yardstick in the
same process is one forward pass of the whole model over the same prompt.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent
TIMES = 30
TOKENS = 100


def measure(encoder: str, layers: int, table: bool) -> dict[str, float]:
    """Return what one router costs; called in a process of its own."""
    import psutil
    import torch
    from prompts import examples, load

    from routers import Brief, Candidate, Policy
    from routers.encoders import _tokenizer
    from routers.gated import macro
    from routers.prompt import kind

    torch.set_num_threads(1)
    path = Path(os.environ["COMPOSER_ZOO"]) / encoder
    own = examples(10)
    candidates = tuple(
        Candidate(id=name, path=str(path), parameters=1, examples=tuple(texts)) for name, texts in own.items()
    )
    first = candidates[0].id
    with tempfile.TemporaryDirectory() as home:
        brief = Brief(candidates=candidates, policy=Policy(abstain_to=first), encoder=first, layer=layers, table=table)
        if os.fork() == 0:  # building takes memory of its own
            try:
                manifest = kind.build(brief, Path(home))
                manifest.save(Path(home) / "manifest.json")
            finally:
                os._exit(0)
        os.wait()
        from routers import RouterManifest

        process = psutil.Process()
        tokenizer = _tokenizer(first, candidates[0])
        tokenizer("warm")
        before = process.memory_info().rss
        manifest = RouterManifest.load(Path(home) / "manifest.json")
        router = kind.load(manifest, Path(home), candidates)
        words = " ".join(text for texts in own.values() for text in texts)
        prompt = tokenizer.decode(tokenizer(words, add_special_tokens=False).input_ids[:TOKENS])
        router.route(prompt)
        grown = process.memory_info().rss - before
        spent = []
        for _ in range(TIMES):
            began = time.perf_counter()
            router.route(prompt)
            spent.append(time.perf_counter() - began)
        prompts = [one for one in load() if one.domain in own]
        names = list(own)
        pairs = [(names.index(one.domain), names.index(router.route(one.text).expert)) for one in prompts]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False).input_ids])
    with torch.inference_mode():
        whole = []
        for _ in range(5):
            began = time.perf_counter()
            model(input_ids=ids)
            whole.append(time.perf_counter() - began)
    return {
        "accuracy": round(100 * macro(pairs), 1),
        "milliseconds": round(1000 * float(np.median(spent)), 2),
        "megabytes": round(grown / 1e6, 1),
        "of_a_forward_pass": round(float(np.median(spent) / np.median(whole)), 4),
    }


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--encoder", default="smollm2-135m-instruct")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.encoder, int(options.one[0]), options.one[1] == "table")))
        return
    for layers, table in (
        (0, False),
        (1, False),
        (2, False),
        (4, False),
        (8, False),
        (15, False),
        (0, True),
        (4, True),
        (8, True),
    ):
        command = [
            sys.executable,
            __file__,
            "--encoder",
            options.encoder,
            "--one",
            str(layers),
            "table" if table else "layers",
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        row = json.loads(done.stdout.strip().splitlines()[-1])
        print(json.dumps({"encoder": options.encoder, "layers": layers, "table": table, **row}), flush=True)


if __name__ == "__main__":
    main()
