"""Whether the expert that a router chooses is the one that answers best.

    COMPOSER_ZOO=DIR COMPOSER_DATA=DIR python benchmarks/routing/regret.py --store DIR [--held-out N] [--dtype TYPE]

Every expert (the five SmolLM2 specialists and their base) answers every held-out item of five tasks; routers see the
prompts only. Values are means over tasks of what answers score (accuracy, or probability per token for GSM8K and MBPP).
Regret is the distance to the best expert of each item. `domain` sends an item to the expert that was trained for its
task, which is what domain accuracy takes for right.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from ruamel.yaml import YAML

from composer.artefacts import Store
from composer.cli import _quiet_libraries
from composer.evaluation.in_process import score_checkpoint
from composer.evaluation.live import contexts
from composer.evaluation.settings import EvaluateSection
from composer.evaluation.tasks import split_of
from composer.mixture import Expert, Known
from composer.mixture.examples import text_losses
from composer.mixture.routing import brief_of, candidates_of
from composer.mixture.settings import MixtureSection, RouterSection
from composer.probes import ProbesSection, load_texts
from composer.zoo import inspect_checkpoint
from routers import ROUTERS

ROOT = Path(__file__).resolve().parents[2]
DOMAINS = {"smol_sst2": "smol-sst2", "smol_agnews": "smol-agnews", "smol_arc_easy": "smol-science",
           "smol_gsm8k": "smol-math", "smol_mbpp": "smol-code"}  # fmt: skip
BASE = "smollm2-135m-instruct"
GENERAL = ("Tell me about yourself.", "What should I cook tonight?", "Write a short letter to a friend.",
           "Can you help me plan a trip?", "What does this proverb mean?", "Summarise the text for me.")  # fmt: skip
"""Requests for the base, which is there for what the specialists are not for."""
SECTIONS: dict[str, dict[str, str]] = {
    "prompt": {"kind": "prompt"},
    "prompt, at most 4 layers": {"kind": "prompt", "preset": "balanced"},
    "prompt, table": {"kind": "prompt", "preset": "fast"},
    "linear": {"kind": "linear"},
    "linear, learnt from proxy items": {"kind": "linear", "learn_from": "proxy"},
    "mlp, learnt from proxy items": {"kind": "mlp", "learn_from": "proxy"},
    "mlp, learnt from plain texts": {"kind": "mlp", "learn_from": "language"},
    "prompt_glue": {"kind": "prompt_glue"},
    "random": {"kind": "random"},
}
RESAMPLES = 2000


def difference(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> list[float]:
    """Return the mean over tasks of paired differences, with its 95 % bootstrap interval over items."""
    dice = np.random.default_rng(0)
    apart = {task: first[task] - second[task] for task in first}
    draws = [
        np.mean([own[dice.integers(0, len(own), len(own))].mean() for own in apart.values()]) for _ in range(RESAMPLES)
    ]
    values = (np.mean([own.mean() for own in apart.values()]), *np.percentile(draws, [2.5, 97.5]))
    return [round(float(one), 4) for one in values]


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--held-out", type=int, default=60)
    parser.add_argument("--proxy", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16", help="what models are computed in")
    options = parser.parse_args()
    if not os.environ.get("COMPOSER_ZOO") or not os.environ.get("COMPOSER_DATA"):
        parser.error("set COMPOSER_ZOO and COMPOSER_DATA")
    _quiet_libraries()
    zoo, store = Path(os.environ["COMPOSER_ZOO"]), Store(options.store.resolve())
    section = EvaluateSection(
        include=str(ROOT / "recipes" / "smollm2" / "tasks"),
        tasks=list(DOMAINS),
        batch_size=8,
        proxy_limit=options.proxy,
        held_out_limit=options.held_out,
        dtype=options.dtype,
    )
    recipe = YAML(typ="safe").load(ROOT / "recipes" / "smollm2.yaml")
    examples = {one["id"]: tuple(one.get("examples", ())) for one in recipe["zoo"]["models"]}
    examples |= {"smol-code": examples["qwen-coder"], BASE: GENERAL}  # who answers them where it is not
    experts = tuple(
        Expert(id=name, checkpoint=inspect_checkpoint(name, zoo / name, store), members=(name,),
               examples=examples[name], reason="a benchmark")
        for name in (*DOMAINS.values(), BASE)
    )  # fmt: skip
    proxy, held_out = (split_of(section, one) for one in ("proxy", "held_out"))
    probes = ProbesSection()
    texts = load_texts(probes.texts, probes.limit, probes.characters)
    known = Known(
        score=lambda one: score_checkpoint(one, proxy, store, batch_size=8),
        contexts=lambda: {items.name: contexts(items) for items in proxy.tasks},
        losses=lambda own: (texts, text_losses(own, texts, store)),
    )
    scores = {one.id: score_checkpoint(one.checkpoint, held_out, store, batch_size=8) for one in experts}
    asked = {items.name: contexts(items) for items in held_out.tasks}
    values = {
        task: {name: np.array([own.task(task).items[item] for item in prompts]) for name, own in scores.items()}
        for task, prompts in asked.items()
    }
    single = {name: {task: own[name] for task, own in values.items()} for name in scores}
    best = max(single, key=lambda name: np.mean([own.mean() for own in single[name].values()]))
    oracle = {task: np.max(list(own.values()), axis=0) for task, own in values.items()}
    rows: dict[str, dict[str, np.ndarray]] = {
        f"best single expert: {best}": single[best],
        "domain": {task: values[task][DOMAINS[task]] for task in values},
    }
    right: dict[str, float] = {"domain": 1.0}
    for name, settings in SECTIONS.items():
        with tempfile.TemporaryDirectory() as home:
            brief = brief_of(experts, MixtureSection(router=RouterSection(**settings)), known)
            kind = ROUTERS.get(settings["kind"])
            router = kind.load(kind.build(brief, Path(home)), Path(home), candidates_of(experts))
            chosen = {task: [router.route(text).expert for text in prompts.values()] for task, prompts in asked.items()}
        rows[name] = {
            task: np.array([values[task][expert][place] for place, expert in enumerate(own)])
            for task, own in chosen.items()
        }
        right[name] = round(
            float(np.mean([np.mean([one == DOMAINS[task] for one in own]) for task, own in chosen.items()])), 3
        )
    rows["best expert for each item"] = oracle
    for name, own in rows.items():
        row: dict[str, object] = {
            "router": name,
            "value": round(float(np.mean([one.mean() for one in own.values()])), 4),
        }
        row["domain_accuracy"] = right.get(name)
        row["regret"] = difference(oracle, own)
        row["over_best_single"] = difference(own, single[best])
        row["over_domain"] = difference(own, rows["domain"])
        row["by_task"] = {task: round(float(one.mean()), 3) for task, one in own.items()}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
