"""How long the quickstart takes and how much memory it needs, engines included.

    python benchmarks/quickstart.py

Runs the recipe in a fresh run directory and samples the memory of the whole process tree twice a second. Memory is
proportional set size (Linux): pages shared by several engines count once.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent


def tree_bytes(process: psutil.Process) -> int:
    """Return the proportional set size of a process and all its descendants."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def main() -> None:
    """Run once and print one JSON object."""
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, "-m", "composer.cli", "run", str(ROOT / "recipes" / "quickstart.yaml")]
        environment = {**os.environ, "MODEL_COMPOSER_RUNS": runs, "HF_HUB_OFFLINE": "1"}
        began = time.monotonic()
        answer = Path(runs) / "answer.json"
        arguments = [*command, "--yes", "--json", "serve.port=0"]
        with answer.open("w") as output, subprocess.Popen(arguments, stdout=output, env=environment, cwd=ROOT) as run:
            peak = 0
            while run.poll() is None:
                try:
                    peak = max(peak, tree_bytes(psutil.Process(run.pid)))
                except psutil.Error:
                    break
                time.sleep(0.5)
        seconds = time.monotonic() - began
        if run.returncode:
            sys.exit(f"the run failed with exit code {run.returncode}")
        report = json.loads((Path(json.loads(answer.read_text())["run"]) / "report.json").read_text())
        print(
            json.dumps(
                {
                    "seconds": round(seconds, 1),
                    "peak_gb": round(peak / 1e9, 2),
                    "stages": {name: round(value, 1) for name, value in report["seconds"].items()},
                    "engines": report["endpoint"]["engines"],
                    "verdict": report["evidence"]["verdict"],
                }
            )
        )


if __name__ == "__main__":
    main()
