"""What searches gain on a real zoo: proxy items choose, held-out items judge.

    COMPOSER_ZOO=DIR COMPOSER_DATA=DIR python benchmarks/search.py --store DIR [STRATEGY[:OPERATOR] ...] [key=value ...]

The models are SmolLM2-135M-Instruct's five fine-tunes of recipes/smollm2.yaml, the tasks what they were tuned for.
Each search is one of the recipe's strategies (average, coefficient, similarity, evolution, simmerge, bandit), with one
operator or, without ":OPERATOR", with those it takes by default; settings override `merge.…` or `evaluate.…`. What each
search keeps is scored on the held-out items and compared with the best single model and with the uniform average of the
five, with 95 % paired bootstrap intervals. Everything that was scored is kept in the store, so a run that was stopped
goes on.

The README's figures: coefficient:task_arithmetic evolution:task_arithmetic simmerge merge.dtype=float16
evaluate.proxy_limit=16 evaluate.held_out_limit=60 merge.evolution.trials=40
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from composer.artefacts import Store
from composer.clustering import Cluster
from composer.evaluation.statistics import paired_interval
from composer.executors import LocalExecutor
from composer.merging.judge import Judge
from composer.merging.merge import merge_cluster
from composer.merging.plan import MergeStep
from composer.merging.strategies import STRATEGIES, Foresighted
from composer.merging.trials import TrialLog
from composer.merging.workbench import Workbench
from composer.progress import Step
from composer.recipe import load_recipe
from composer.simmerge.advisor import Advisor
from composer.zoo import Zoo, inspect_checkpoint

ROOT = Path(__file__).resolve().parent.parent
BASE = "smollm2-135m-instruct"
FIVE = ("smol-sst2", "smol-agnews", "smol-science", "smol-math", "smol-code")
TASKS = ("smol_sst2", "smol_agnews", "smol_arc_easy", "smol_gsm8k", "smol_mbpp")
SEARCHES = (
    "average:linear",
    "coefficient:linear",
    "coefficient:task_arithmetic",
    "similarity:task_arithmetic",
    "evolution:linear",
    "evolution:task_arithmetic",
)


def show(step: Step) -> None:
    """Print progress on one line, where somebody looks."""
    if sys.stderr.isatty():
        print(f"\r\033[K{step.message} {step.done or ''}/{step.total or ''}", end="", file=sys.stderr)


def main() -> None:
    """Search and weigh."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="STRATEGY[:OPERATOR] or key=value")
    parser.add_argument("--store", type=Path, required=True)
    options = parser.parse_args()
    if not os.environ.get("COMPOSER_ZOO") or not os.environ.get("COMPOSER_DATA"):
        sys.exit("set COMPOSER_ZOO and COMPOSER_DATA; see the top of this file")
    settings = [word for word in options.words if "=" in word]
    searches = [word for word in options.words if "=" not in word] or SEARCHES
    zoo, store = Path(os.environ["COMPOSER_ZOO"]), Store(options.store)
    plain = ["merge.strategy=average", f"evaluate.tasks=[{','.join(TASKS)}]"]
    evaluate = load_recipe(ROOT / "recipes" / "smollm2.yaml", [*plain, *settings])
    judge = Judge(evaluate.evaluate, evaluate.probes, store.root)
    executor = LocalExecutor(lambda: judge)
    base = inspect_checkpoint(BASE, zoo / BASE, store)
    members = tuple(inspect_checkpoint(name, zoo / name, store) for name in FIVE)
    cluster = Cluster(id="cluster-1", members=FIVE, representative=FIVE[0], reason="")
    proxy = judge.split("proxy")
    held_out = {one.id: judge.score(one, "held_out") for one in (*members, base)}
    best = max(FIVE, key=lambda name: held_out[name].mean)
    for name, scores in held_out.items():
        tasks = {task.task: round(task.mean, 4) for task in scores.tasks}
        print(json.dumps({"model": name, "held_out": round(scores.mean, 4), **tasks}), flush=True)

    def bench(overrides: list[str]) -> Workbench:
        section = load_recipe(ROOT / "recipes" / "smollm2.yaml", [*plain, *overrides, *settings]).merge
        advisor = Advisor(base, proxy, evaluate.probes, section, store, lambda: executor, show)
        return Workbench(
            zoo=Zoo(members=members, base=base),
            cluster="cluster-1",
            section=section,
            advise=advisor.advise,
            memory=store.root,
            executor=executor,
            log=TrialLog(store.root / "trials.sqlite"),
            proxy={items.name: items.hashes for items in proxy.tasks},
            fingerprint=proxy.fingerprint,
            progress=show,
        )

    uniform = bench([]).keep(MergeStep(name="uniform", operator="linear", inputs=FIVE))
    held_out["uniform"] = judge.score(uniform, "held_out")
    print(json.dumps({"model": "uniform average", "held_out": round(held_out["uniform"].mean, 4)}), flush=True)
    for word in searches:
        strategy, _, operator = word.partition(":")
        work = bench([f"merge.strategy={strategy}", *([f"merge.operators=[{operator}]"] if operator else [])])
        began = time.monotonic()
        chosen = STRATEGIES.get(strategy)
        plan, row = chosen.plan(cluster, work.section), {"search": word}
        if isinstance(chosen, Foresighted) and work.advise is not None:
            plan = chosen.foresee(plan, work.advise(members), work.section)
            row |= {"weighed": plan.advice.weighed if plan.advice else 0, "plan": plan.intent}
        outcome = merge_cluster(plan, work)
        row |= {
            "seconds": round(time.monotonic() - began),
            "made": [f"{t.step.operator}({', '.join(t.step.inputs)})" for t in outcome.trials if t.accepted],
            "candidates": sum(trial.tried for trial in outcome.trials),
            "dropped_early": sum(trial.stopped for trial in outcome.trials),
            "weights": {name: round(value, 3) for name, value in outcome.weights.items()},
        }
        if outcome.result is not None:
            accepted = [trial for trial in outcome.trials if trial.accepted and trial.score is not None]
            scores = judge.score(outcome.result, "held_out")
            row |= {"proxy": round(max(trial.score or 0 for trial in accepted), 4), "held_out": round(scores.mean, 4)}
            row |= {task.task: round(task.mean, 4) for task in scores.tasks}
            for label, other in (("best_single", best), ("uniform", "uniform")):
                interval = paired_interval(scores, held_out[other])
                row[f"minus_{label}"] = [round(value, 4) for value in interval]
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
