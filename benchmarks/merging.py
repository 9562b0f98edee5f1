"""What merging as a search costs, against mergekit measured in the same run.

    COMPOSER_ZOO=DIR COMPOSER_DATA=DIR python benchmarks/merging.py [PART ...]

Parts: trial, export, search, choices, scorer; all by default. DIR holds SmolLM2-135M-Instruct and five fine-tunes of
it as Hugging Face directories (smollm2-135m-instruct, smol-sst2, …), and the data sets of recipes/smollm2.yaml. Prints
one JSON object a measurement; each is made in a process of its own, times are medians.

- trial: from coefficients to a model that is ready to be scored, three inputs, against the command line
  (`mergekit-yaml`) on the same merge; TIES and others from the second trial on, against a call of mergekit's
  `run_merge` in a process that is warm. `remembered_s` is what the first trial took.
- export: writing a merge, against `run_merge` on the same configuration; whether the files hold the same.
- search, choices: strategy `coefficient` over six models on the recipe's five tasks, or on the three of them that are
  multiple choice, ITEMS proxy items each, against the plain way: each candidate merged to
  disk by `run_merge`, loaded by transformers, scored by lm-eval. Of the plain way every SAMPLEth candidate is made,
  and the total is its mean times the number of candidates. Memory is what the search adds to a process that has
  imported everything, in models' worth of float32.
- scorer: a whole trial of three models, merged, brought to where it is scored, and scored on ITEMS items a task, by
  torch and by vLLM (`evaluate.scorer`): on three tasks that are multiple choice, and on one where 64 tokens are
  written. `start_s` is the first trial, in which the engine starts; the others are medians. Both find the same values
  on so many of the items.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
BASE = "smollm2-135m-instruct"
NAMES = ("smol-math", "smol-code", "smol-science", "smol-sst2", "smol-agnews")
ROUNDS = 5
SAMPLE = 9
ITEMS = 24
CHOICES = "[smol_sst2, smol_agnews, smol_arc_easy]"
TRIALS: dict[str, list[dict[str, Any]]] = {
    "linear": [{"weight": [0.2 + 0.1 * n, 0.5, 0.3]} for n in range(ROUNDS + 1)],
    "task_arithmetic": [{"weight": 0.2 + 0.1 * n} for n in range(ROUNDS + 1)],
    "slerp": [{"t": 0.1 + 0.1 * n} for n in range(ROUNDS + 1)],
    "ties": [{"weight": [0.2 + 0.1 * n, 1.0, 0.7], "density": 0.3} for n in range(ROUNDS + 1)],
    "dare_ties": [{"weight": 0.2 + 0.1 * n, "density": 0.5} for n in range(ROUNDS + 1)],
}
WRITTEN = """task: smol_written
custom_dataset: !function loaders.gsm8k
output_type: generate_until
test_split: test
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{answer.split('####')[-1].strip()}}"
generation_kwargs: {max_gen_toks: 64, until: ["Question:"], do_sample: false}
process_results: !function spelled.spelled
metric_list:
  - {metric: spelled, aggregation: mean, higher_is_better: true}
"""
"""A task that is generated, whose value tells one text from another."""
SPELLED = (
    "def spelled(doc, results):\n    return {'spelled': float(sum(n * ord(c) for n, c in enumerate(results[0], 1)))}\n"
)
COMMAND_LINE = ("linear", "task_arithmetic")


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds an action takes, and its result."""
    began = time.perf_counter()
    result = action()
    return time.perf_counter() - began, result


def zoo() -> Path:
    """Return the directory of the checkpoints."""
    return Path(os.environ["COMPOSER_ZOO"])


@cache
def inspected(name: str, root: Path) -> Any:
    """Return a checkpoint of the zoo; its hash is known to the store of `root` from then on."""
    from composer.artefacts import Store
    from composer.zoo import inspect_checkpoint

    return inspect_checkpoint(name, zoo() / name, Store(root))


def bound(operator: str, parameters: dict[str, Any], shelf: Any, store: Any) -> Any:
    """Return a merge of the first specialists."""
    from composer.merging.engine.merge import Merge
    from composer.merging.operators import OPERATORS
    from composer.merging.plan import MergeStep

    names = NAMES[: OPERATORS.get(operator).most or 3]
    models = [inspected(name, store.root) for name in names]
    base = inspected(BASE, store.root)
    return Merge(MergeStep(name="m", operator=operator, inputs=names, parameters=parameters), models, base, shelf)


def configured(merge: Any) -> dict[str, Any]:
    """Return a merge as mergekit's configuration."""
    from composer.merging.engine.stock import stock_config

    return stock_config(merge, {one.content_hash: one.path for one in [*merge.inputs, merge.donor]})


def trial(operator: str, directory: Path) -> dict[str, float]:
    """Time trials of one operator."""
    from composer.artefacts import Store
    from composer.merging.engine.live import LiveModel
    from composer.merging.engine.shelf import Shelf

    store, shelf = Store(directory), Shelf()
    settings = TRIALS[operator]
    live = LiveModel(bound(operator, settings[0], shelf, store))
    times = [timed(lambda one=one: live.load(bound(operator, one, shelf, store)))[0] for one in settings]
    return {"remembered_s": times[0], "ours_s": statistics.median(times[1:])}


def command_line(operator: str, directory: Path) -> dict[str, float]:
    """Time mergekit's command line."""
    from ruamel.yaml import YAML

    from composer.artefacts import Store
    from composer.merging.engine.shelf import Shelf

    config = configured(bound(operator, TRIALS[operator][1], Shelf(), Store(directory / "store")))
    file = directory / "merge.yaml"
    YAML().dump(config, file)
    tool = str(Path(sys.executable).parent / "mergekit-yaml")
    times = []
    for number in range(3):
        command = [tool, str(file), str(directory / f"out{number}"), "--quiet"]
        times.append(timed(lambda command=command: subprocess.run(command, check=True, capture_output=True))[0])
    return {"command_line_s": statistics.median(times)}


def stock_call(operator: str, directory: Path) -> dict[str, float]:
    """Time mergekit's call in a process that is warm."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    from composer.artefacts import Store
    from composer.merging.engine.shelf import Shelf

    times = []
    for number, settings in enumerate(TRIALS[operator][:3]):
        config = configured(bound(operator, settings, Shelf(), Store(directory / "store")))
        options = MergeOptions(quiet=True, random_seed=0, write_model_card=False)
        out = str(directory / f"out{number}")
        times.append(
            timed(lambda c=config, o=options, out=out: run_merge(MergeConfiguration.model_validate(c), out, o))[0]
        )
    return {"run_merge_s": statistics.median(times[1:])}


def export(operator: str, directory: Path) -> dict[str, Any]:
    """Time writing a merge, ours and mergekit's in turn, and compare the files."""
    import torch
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    from safetensors.torch import load_file

    from composer.artefacts import Store
    from composer.merging.engine.export import export as write
    from composer.merging.engine.shelf import Shelf

    bound(operator, TRIALS[operator][0], Shelf(), Store(directory / "hashes"))  # hashes of the inputs are known by now
    ours, theirs, same = [], [], True
    for number, settings in enumerate(TRIALS[operator][:4]):
        store = Store(directory / "hashes")
        merge = bound(operator, settings, Shelf(), store)
        seconds, kept = timed(lambda merge=merge, store=store: write(merge, "kept", store))
        ours.append(seconds)
        options = MergeOptions(quiet=True, random_seed=0)
        out = str(directory / f"out{number}")
        config = MergeConfiguration.model_validate(configured(merge))
        theirs.append(timed(lambda config=config, out=out, options=options: run_merge(config, out, options))[0])
        first, second = load_file(f"{kept.path}/model.safetensors"), load_file(f"{out}/model.safetensors")
        same &= first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    mine, stock = statistics.median(ours[1:]), statistics.median(theirs[1:])
    return {"ours_s": mine, "run_merge_s": stock, "ratio": stock / mine, "equal": same}


class Memory(threading.Thread):
    """Watches what a process holds: its own memory, and pages of mapped files."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.own = self.files = 0
        self.start()

    def run(self) -> None:
        """Look every few milliseconds."""
        while True:
            status = Path("/proc/self/status").read_text()
            fields = dict(line.split(":", 1) for line in status.splitlines() if line.startswith("Rss"))
            self.own = max(self.own, int(fields["RssAnon"].split()[0]) * 1024)
            self.files = max(self.files, int(fields["RssFile"].split()[0]) * 1024)
            time.sleep(0.02)


def workbench(directory: Path, tasks: str) -> tuple[Any, Any]:
    """Return the plan and the workbench of a coefficient search."""
    from composer.artefacts import Store
    from composer.clustering import Cluster
    from composer.executors import LocalExecutor
    from composer.merging.judge import Judge
    from composer.merging.settings import MergeSection
    from composer.merging.strategies import STRATEGIES
    from composer.merging.trials import TrialLog
    from composer.merging.workbench import Workbench
    from composer.recipe import load_recipe
    from composer.zoo import Zoo, inspect_checkpoint

    overrides = [f"evaluate.proxy_limit={ITEMS}", *([f"evaluate.tasks={tasks}"] if tasks else [])]
    recipe = load_recipe(ROOT / "recipes" / "smollm2.yaml", overrides)
    store = Store(directory)
    models = tuple(inspect_checkpoint(name, zoo() / name, store) for name in (*NAMES, BASE))
    judge = Judge(recipe.evaluate, recipe.probes, store.root)
    split = judge.split("proxy")
    section = MergeSection(strategy="coefficient")
    bench = Workbench(
        zoo=Zoo(members=models, base=models[-1]),
        cluster="cluster-1",
        section=section,
        executor=LocalExecutor(lambda: judge),
        log=TrialLog(store.root / "trials.sqlite"),
        proxy={items.name: items.hashes for items in split.tasks},
        fingerprint=split.fingerprint,
    )
    cluster = Cluster(id="cluster-1", members=(*NAMES, BASE), representative=BASE, reason="")
    return STRATEGIES.get("coefficient").plan(cluster, section), bench


def search(tasks: str, directory: Path) -> dict[str, Any]:
    """Time a search, and weigh it."""
    import mergekit.merge_methods
    import transformers

    from composer.merging.merge import merge_cluster

    del mergekit, transformers
    plan, bench = workbench(directory, tasks)
    before = psutil.Process().memory_info().rss
    memory = Memory()
    alone, _ = timed(lambda: bench.scores(plan.members))
    seconds, outcome = timed(lambda: merge_cluster(plan, bench))
    rows = bench.log._base.execute(
        "SELECT count(*), sum(merge_seconds), sum(score_seconds), sum(items) FROM trials"
    ).fetchone()
    one = 4 * bench.zoo.members[0].parameters
    written = sum(file.stat().st_size for file in (directory / "merged").rglob("*.safetensors"))
    return {
        "candidates": rows[0],
        "members_s": alone,
        "search_s": seconds,
        "merging_s": rows[1],
        "scoring_s": rows[2],
        "items_of_all": rows[3] / (rows[0] * sum(len(items) for items in bench.proxy.values())),
        "models_worth": (memory.own - before) / one,
        "mapped_models_worth": memory.files / one,
        "written_bytes": written,
        "one_model_bytes": bench.zoo.members[0].size_bytes,
        "weights": outcome.weights,
        "gain": [trial.gain for trial in outcome.trials],
    }


def plain_search(tasks: str, directory: Path) -> dict[str, Any]:
    """Time a few candidates of the same search made the plain way."""
    import gc

    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    from composer.evaluation.in_process import load_model
    from composer.evaluation.tasks import run_tasks
    from composer.merging.engine.merge import Merge
    from composer.merging.engine.shelf import Shelf
    from composer.merging.plan import MergeStep
    from composer.zoo import inspect_checkpoint

    _, bench = workbench(directory, tasks)
    [judge] = [bench.executor._make()]
    split, store = judge.split("proxy"), judge.store
    times = []
    candidates = [(first, share) for first in range(len(NAMES)) for share in range(1, 10)]
    for number, (first, share) in enumerate(candidates[SAMPLE // 2 :: SAMPLE]):
        names = (NAMES[first], BASE)
        step = MergeStep(name="m", operator="linear", inputs=names, parameters={"weight": [share / 10, 1 - share / 10]})
        merge = Merge(step, [bench.zoo[name] for name in names], None, Shelf())
        config, out = configured(merge), directory / f"plain{number}"

        def one(config: dict[str, Any] = config, out: Path = out) -> None:
            run_merge(MergeConfiguration.model_validate(config), str(out), MergeOptions(quiet=True))
            made = inspect_checkpoint("made", out, store)
            run_tasks(load_model(made, 8), split, "made")

        times.append(timed(one)[0])
        gc.collect()
    return {"sampled": len(times), "plain_candidate_s": statistics.fmean(times)}


def whole_trial(kind: str, scorer: str, directory: Path) -> dict[str, Any]:
    """Time trials from coefficients to scores."""
    from composer.artefacts import Store
    from composer.evaluation.settings import EvaluateSection
    from composer.merging.judge import Bench, Judge
    from composer.merging.plan import MergeStep
    from composer.probes import ProbesSection

    tasks = directory / "tasks"
    shutil.copytree(ROOT / "recipes" / "smollm2" / "tasks", tasks)
    (tasks / "smol_written.yaml").write_text(WRITTEN)
    (tasks / "spelled.py").write_text(SPELLED)
    names = CHOICES.strip("[]").split(", ") if kind == "choices" else ["smol_written"]
    section = EvaluateSection(tasks=names, include=str(tasks), proxy_limit=ITEMS, batch_size=8)
    judge = Judge(section, ProbesSection(), Store(directory).root)
    inputs = [inspected(name, directory) for name in NAMES[:3]]
    bench = Bench(base=inspected(BASE, directory), scorer=scorer)
    judge.split("proxy")
    took, values = [], []
    for settings in TRIALS["linear"]:
        step = MergeStep(name="m", operator="linear", inputs=NAMES[:3], parameters=settings)
        seconds, measured = timed(lambda step=step: judge.trial(step, inputs, bench, None))
        took.append((seconds, measured.merge_seconds, measured.score_seconds))
        values += [value for task in measured.scores.tasks for value in task.items.values()]
    judge.close()
    whole, merging, scoring = (statistics.median(one) for one in zip(*took[1:], strict=True))
    return {"start_s": took[0][0], "trial_s": whole, "merging_s": merging, "scoring_s": scoring, "values": values}


def child(part: str, *arguments: str) -> dict[str, Any]:
    """Run a part in a process of its own."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, __file__, "--child", part, directory, *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{part} {' '.join(arguments)}: {done.stderr[-2000:]}")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found


def show(part: str, values: dict[str, Any]) -> None:
    """Print a measurement."""
    rounded = {key: round(value, 3) if isinstance(value, float) else value for key, value in values.items()}
    print(json.dumps({"part": part, **rounded}), flush=True)


def main(parts: list[str]) -> None:
    """Measure."""
    if "trial" in parts:
        for operator in TRIALS:
            ours = child("trial", operator)
            if operator in COMMAND_LINE:
                rival = child("command_line", operator)
                show(
                    "trial", {"operator": operator, **ours, **rival, "ratio": rival["command_line_s"] / ours["ours_s"]}
                )
            else:
                rival = child("stock_call", operator)
                show("trial", {"operator": operator, **ours, **rival, "ratio": rival["run_merge_s"] / ours["ours_s"]})
    if "export" in parts:
        for operator in ("linear", "task_arithmetic", "dare_ties"):
            show("export", {"operator": operator, **child("export", operator)})
    for part, tasks in (("search", ""), ("choices", CHOICES)):
        if part in parts:
            ours, plain = child("search", tasks), child("plain_search", tasks)
            whole = plain["plain_candidate_s"] * ours["candidates"]
            show(part, {**ours, **plain, "plain_search_s": whole, "ratio": whole / ours["search_s"]})
    for kind in ("choices", "written") if "scorer" in parts else ():
        found = {scorer: child("whole_trial", kind, scorer) for scorer in ("torch", "vllm")}
        first, second = (one.pop("values") for one in found.values())
        same = sum(one == other for one, other in zip(first, second, strict=True))
        for scorer, values in found.items():
            show("scorer", {"kind": kind, "scorer": scorer, **values, "same": same, "of": len(first)})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        action = globals()[sys.argv[2]]
        print(json.dumps(action(*sys.argv[4:], Path(sys.argv[3]))))
    else:
        if not os.environ.get("COMPOSER_ZOO"):
            sys.exit("set COMPOSER_ZOO (and COMPOSER_DATA for the search); see the top of this file")
        main(sys.argv[1:] or ["trial", "export", "search", "choices", "scorer"])
