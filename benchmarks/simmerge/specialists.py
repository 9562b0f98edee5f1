"""Make the exhaustive table of merges of the five SmolLM2-135M specialists, which nothing is ever trained on.

    COMPOSER_ZOO=DIR COMPOSER_DATA=DIR python benchmarks/simmerge/specialists.py --store DIR [--out FILE]

All ten pairs by every arm (in both orders where order counts for two), all triples and quadruples by the arms that take
them at once, and, for means into which models come one after another, in every order that makes a difference. Features
come from 16 proxy items a task, scores from held-out items: 32 of SST-2, AG News and ARC-Easy, 8 of GSM8K and MBPP,
whose likelihoods are far less noisy than accuracies. About 12 s a merge on 2 cores; what was scored is kept.
"""

import argparse
import os
import sys
from dataclasses import replace
from itertools import combinations, permutations
from pathlib import Path

from composer.artefacts import Store
from composer.cli import _quiet_libraries
from composer.evaluation.settings import EvaluateSection
from composer.evaluation.tasks import Split, split_of
from composer.executors import LocalExecutor
from composer.merging.judge import Judge
from composer.probes import ProbesSection
from composer.progress import Step
from composer.simmerge.arms import ARMS, Arm
from composer.simmerge.collect import Candidate, candidate, collect
from composer.zoo import inspect_checkpoint

ROOT = Path(__file__).resolve().parent
BASE = "smollm2-135m-instruct"
FIVE = ("smol-sst2", "smol-agnews", "smol-science", "smol-math", "smol-code")
ITEMS = {"smol_sst2": 32, "smol_agnews": 32, "smol_arc_easy": 32, "smol_gsm8k": 8, "smol_mbpp": 8}
WIDE = (
    Arm("linear"),
    *(Arm("task_arithmetic", {"weight": one}) for one in (0.4, 0.7, 1.0)),
    Arm("ties", {"lambda": 1.0}),
    Arm("ties", {"lambda": 1.5}),
    Arm("della", {"lambda": 1.0}),
    Arm("dare_ties", {"weight": 0.5}),
)
ONE_AFTER_ANOTHER = Arm("linear", keeps=0.5)


def candidates() -> list[Candidate]:
    """Return all merges of the table, those of two first."""
    found = []
    for pair in combinations(range(len(FIVE)), 2):
        for arm in (arm for own in ARMS.values() for arm in own):
            orders = [pair, pair[::-1]] if arm.operator == "arcee_fusion" else [pair]
            found += [candidate(FIVE, order, arm) for order in orders]
    for size in (3, 4):
        for group in combinations(range(len(FIVE)), size):
            found += [candidate(FIVE, group, arm) for arm in WIDE]
            # The first two count the same, so exchanging them makes no difference.
            orders = [order for order in permutations(group) if order[0] < order[1]]
            found += [candidate(FIVE, order, ONE_AFTER_ANOTHER) for order in orders]
    return found


def first(split: Split, counts: dict[str, int]) -> Split:
    """Return the first items of each task by their hash."""
    kept = tuple(one.only(sorted(one.hashes)[: counts[one.name]]) for one in split.tasks)
    return replace(split, tasks=kept)


def show(step: Step) -> None:
    """Print each merge."""
    print(f"{step.done or ''}/{step.total or ''} {step.message}", flush=True)


def main() -> None:
    """Make the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=ROOT / "specialists.parquet")
    parser.add_argument("--dtype", default="bfloat16", help="what models are computed in")
    parser.add_argument("--most", type=int, help="stop after so many merges of the list")
    options = parser.parse_args()
    if not os.environ.get("COMPOSER_ZOO") or not os.environ.get("COMPOSER_DATA"):
        sys.exit("set COMPOSER_ZOO and COMPOSER_DATA; see the top of this file")
    _quiet_libraries()
    zoo, store = Path(os.environ["COMPOSER_ZOO"]), Store(options.store.resolve())
    section = EvaluateSection(
        include=str(ROOT.parent.parent / "recipes" / "smollm2" / "tasks"),
        tasks=list(ITEMS),
        batch_size=8,
        dtype=options.dtype,
    )
    known = first(split_of(section, "proxy"), dict.fromkeys(ITEMS, 16))
    labels = first(split_of(section, "held_out"), ITEMS)
    probes = ProbesSection()
    judge = Judge(section, probes, store.root, {"proxy": labels})
    models = [inspect_checkpoint(name, zoo / name, store) for name in FIVE]
    rows = collect(
        "smollm2-135m",
        models,
        inspect_checkpoint(BASE, zoo / BASE, store),
        candidates()[: options.most],
        known,
        labels,
        probes,
        store,
        LocalExecutor(lambda: judge),
        options.out,
        dtype="float16",
        progress=show,
    )
    print(f"{rows} rows: {options.out}")


if __name__ == "__main__":
    main()
