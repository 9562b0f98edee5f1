"""The questions of Model-GLUE (arXiv 2410.05357, Q1 to Q5) on real specialists: which level and router, hybrid or not.

    COMPOSER_ZOO=DIR COMPOSER_DATA=DIR python benchmarks/mixtures.py --store DIR [NAME ...] [--dtype TYPE]

Five SmolLM2-135M specialists are mixed at every level; each mixture, each specialist and their uniform average is
scored on the same held-out items of five tasks (accuracy, or probability per token for GSM8K and MBPP). Differences are
paired, with 95 % bootstrap intervals over items. What was scored is kept in the store.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML

from composer.artefacts import Store
from composer.cli import _quiet_libraries
from composer.evaluation.in_process import score_checkpoint
from composer.evaluation.live import contexts
from composer.evaluation.scores import Scores
from composer.evaluation.settings import EvaluateSection
from composer.evaluation.tasks import Split, split_of
from composer.merging.engine.export import export
from composer.merging.engine.merge import Merge
from composer.merging.engine.shelf import Shelf
from composer.merging.plan import MergeStep
from composer.mixture import Composite, Expert, Known, build_composite, load_router
from composer.mixture.examples import text_losses
from composer.mixture.settings import MixtureSection
from composer.probes import ProbesSection, load_texts
from composer.zoo import inspect_checkpoint

ROOT = Path(__file__).resolve().parent.parent
FIVE = ("smol-sst2", "smol-agnews", "smol-science", "smol-math", "smol-code")
ITEMS = {"smol_sst2": 32, "smol_agnews": 32, "smol_arc_easy": 32, "smol_gsm8k": 8, "smol_mbpp": 8}
MIXTURES: dict[str, dict[str, Any]] = {
    "model, prompt router": {},
    "model, linear router on proxy items": {"router": {"kind": "linear", "learn_from": "proxy"}},
    "model, mlp router on proxy items": {"router": {"kind": "mlp", "learn_from": "proxy"}},
    "model, mlp router on plain texts": {"router": {"kind": "mlp", "learn_from": "language"}},
    "model, prompt_glue router": {"router": {"kind": "prompt_glue"}},
    "model, random router": {"router": {"kind": "random"}},
    "models together, 2": {"top_k": 2},
    "block, sample, one gate": {"level": "block", "shared_gate": True},
    "block, sample": {"level": "block"},
    "block, token": {"level": "block", "routing": "token"},
    "block, sample, 10 dense layers": {"level": "block", "shared_gate": True, "dense_layers": 10},
    "ffn, token": {"level": "ffn"},
    "ffn, token, 2": {"level": "ffn", "top_k": 2},
    "ffn, token, 10 dense layers": {"level": "ffn", "dense_layers": 10},
}
RESAMPLES = 2000


def first(split: Split, counts: dict[str, int]) -> Split:
    """Return the first items of each task by their hash."""
    from dataclasses import replace

    return replace(split, tasks=tuple(one.only(sorted(one.hashes)[: counts[one.name]]) for one in split.tasks))


def difference(one: Scores, other: Scores) -> list[float]:
    """Return the mean over tasks of paired differences, with its interval."""
    dice = np.random.default_rng(0)
    apart = []
    for task in one.tasks:
        against = other.task(task.task).items
        apart.append(np.array([value - against[item] for item, value in task.items.items()]))
    draws = [np.mean([own[dice.integers(0, len(own), len(own))].mean() for own in apart]) for _ in range(RESAMPLES)]
    values = (np.mean([own.mean() for own in apart]), *np.percentile(draws, [2.5, 97.5]))
    return [round(float(value), 4) for value in values]


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(MIXTURES))
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16", help="what models are computed in")
    options = parser.parse_args()
    if not os.environ.get("COMPOSER_ZOO") or not os.environ.get("COMPOSER_DATA"):
        parser.error("set COMPOSER_ZOO and COMPOSER_DATA")
    _quiet_libraries()
    zoo, store = Path(os.environ["COMPOSER_ZOO"]), Store(options.store.resolve())
    tasks = str(ROOT / "recipes" / "smollm2" / "tasks")
    section = EvaluateSection(include=tasks, tasks=list(ITEMS), batch_size=8, dtype=options.dtype)
    proxy = first(split_of(section, "proxy"), dict.fromkeys(ITEMS, 16))
    held_out = first(split_of(section, "held_out"), ITEMS)
    recipe = YAML(typ="safe").load(ROOT / "recipes" / "smollm2.yaml")
    examples = {one["id"]: tuple(one.get("examples", ())) for one in recipe["zoo"]["models"]}
    examples |= {"smol-code": examples["qwen-coder"]}  # who answers them where it is not
    experts = tuple(
        Expert(id=name, checkpoint=inspect_checkpoint(name, zoo / name, store), members=(name,),
               examples=examples[name], reason="a benchmark")
        for name in FIVE
    )  # fmt: skip
    probes = ProbesSection()
    texts = load_texts(probes.texts, probes.limit, probes.characters)
    known = Known(
        score=lambda one: score_checkpoint(one, proxy, store, batch_size=8),
        contexts=lambda: {items.name: contexts(items) for items in proxy.tasks},
        losses=lambda own: (texts, text_losses(own, texts, store)),
    )
    rows = {one.id: score_checkpoint(one.checkpoint, held_out, store, batch_size=8) for one in experts}
    best = max(rows, key=lambda name: rows[name].mean)
    step = MergeStep(name="average", operator="linear", inputs=FIVE)
    average = export(Merge(step, [one.checkpoint for one in experts], None, Shelf(), dtype="float16"), "average", store)
    rows["uniform average"] = score_checkpoint(average, held_out, store, batch_size=8)
    for name, own in rows.items():
        show(name, own, rows[best], rows["uniform average"])
    asked = {items.name: contexts(items) for items in held_out.tasks}
    for name in options.names:
        began = time.perf_counter()
        mixture = MixtureSection.model_validate(MIXTURES[name], strict=False)
        directory = build_composite("mix", experts, {}, mixture, store, known)
        composite = Composite.open(directory)
        router = load_router(directory)
        if router is None:
            [whole] = composite.experts
            found = score_checkpoint(whole.checkpoint, held_out, store, batch_size=8)
            size, health = whole.checkpoint.parameters, composite.gates.leave_one_out if composite.gates else None
        else:  # what an expert answers to a prompt it answers alone
            found = rows[best].model_copy(
                update={"tasks": tuple(
                    task.model_copy(update={"items": {
                        item: rows[router.route(asked[task.task][item]).expert].task(task.task).items[item]
                        for item in task.items
                    }})
                    for task in rows[best].tasks
                )}
            )  # fmt: skip
            size, health = composite.parameters, router.manifest.leave_one_out
        spent = round(time.perf_counter() - began, 1)
        show(name, found, rows[best], rows["uniform average"], parameters=size, leave_one_out=health, seconds=spent)


def show(name: str, own: Scores, best: Scores, average: Scores, **more: object) -> None:
    """Print a row."""
    row: dict[str, object] = {"name": name, "mean": round(own.mean, 4)}
    row |= {task.task: round(task.mean, 3) for task in own.tasks}
    row |= {"over_best_single": difference(own, best), "over_average": difference(own, average)}
    print(json.dumps({**row, **more}), flush=True)


if __name__ == "__main__":
    main()
