"""What every operator makes of two and of five real specialists.

    COMPOSER_ZOO=DIR COMPOSER_DATA=DIR python benchmarks/operators.py [--out FILE] [OPERATOR ...]

DIR holds SmolLM2-135M-Instruct and five fine-tunes of it (smollm2-135m-instruct, smol-sst2, …), and the data sets of
recipes/smollm2.yaml. Each merge is made in memory, once with the operator's defaults, and scored on the first 80 test
items of SST-2, AG News and ARC-Easy (40 of GSM8K and MBPP) by the MD5 of their prompt: accuracies by the likelihood of
the answer, for ARC-Easy divided by its length, and nats per answer token. The standard error of an accuracy is about
0.05: enough to tell operators from one another here, not for publishing. The two are sst2 and agnews. GSM8K and MBPP
take most of the time: only single models and five by LIKELIHOODS are scored on them, or all five with --all.

Prints a Markdown table; --out keeps rows as JSON lines, and rows that are in it are not measured again.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import tempfile
from pathlib import Path

from composer.artefacts import Store
from composer.evaluation.scores import Scores
from composer.evaluation.settings import EvaluateSection
from composer.evaluation.tasks import Items, Split, load_split
from composer.merging.judge import Bench, Judge
from composer.merging.operators import OPERATORS
from composer.merging.plan import MergeStep
from composer.probes import ProbesSection
from composer.zoo import inspect_checkpoint

ROOT = Path(__file__).resolve().parent.parent
BASE = "smollm2-135m-instruct"
FIVE = ("smol-sst2", "smol-agnews", "smol-science", "smol-math", "smol-code")
TASKS = {"smol_sst2": 80, "smol_agnews": 80, "smol_arc_easy": 80, "smol_gsm8k": 40, "smol_mbpp": 40}
LIKELIHOODS = ("passthrough", "linear", "task_arithmetic")
PROBES = ProbesSection(limit=16)
# With its defaults an operator is one point of a range; the sums are the ones whose scores are known.
EXTRA = (("task_arithmetic", {"weight": 0.7}),)


def items(name: str, count: int) -> Items:
    """Return the first items of a task by the MD5 of their prompt."""
    whole = load_split([name], "held_out", include=str(ROOT / "recipes" / "smollm2" / "tasks"), proxy=1e-9).tasks[0]
    documents = whole.task.eval_docs
    prompts = {index: str(whole.task.doc_to_text(documents[index])) for index in whole.indices}
    chosen = sorted(
        range(len(whole.indices)),
        key=lambda n: hashlib.md5(prompts[whole.indices[n]].encode()).hexdigest(),  # noqa: S324
    )[:count]
    chosen.sort()
    indices = tuple(whole.indices[n] for n in chosen)
    return Items(task=whole.task, metric=whole.metric, indices=indices, hashes=tuple(whole.hashes[n] for n in chosen))


def columns(scores: Scores, split: Split, tokenizer: object) -> dict[str, float]:
    """Return accuracies, and nats per answer token where the metric is a likelihood per byte."""
    found = {}
    for task, own in zip(scores.tasks, split.tasks, strict=False):
        if task.metric != "byte_likelihood":
            found[task.task] = round(task.mean, 3)
            continue
        nats = tokens = 0.0
        for index, item in zip(own.indices, own.hashes, strict=True):
            document = own.task.eval_docs[index]
            answer = f" {document.get('answer') or document['code']}"
            text = answer if task.task == "smol_gsm8k" else answer[1:]
            nats -= math.log(task.items[item]) * len(answer.encode())
            tokens += len(tokenizer(text).input_ids)  # type: ignore[operator]
        found[task.task] = round(nats / tokens, 3)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("operators", nargs="*", metavar="OPERATOR")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="storage type of merges")
    options = parser.parse_args()
    zoo = os.environ.get("COMPOSER_ZOO")
    if not zoo or not os.environ.get("COMPOSER_DATA"):
        sys.exit("set COMPOSER_ZOO and COMPOSER_DATA; see the top of this file")
    split = Split("proxy", tuple(items(name, count) for name, count in TASKS.items()))
    known = {}
    if options.out and options.out.is_file():
        known = {(row["models"], row["operator"]): row for row in map(json.loads, options.out.read_text().splitlines())}
    with tempfile.TemporaryDirectory() as directory:
        store = Store(Path(directory))
        models = {name: inspect_checkpoint(name, Path(zoo) / name, store) for name in (BASE, *FIVE)}
        judge = Judge(EvaluateSection(tasks=list(TASKS), batch_size=8), PROBES, store.root, {"proxy": split})
        bench = Bench(base=models[BASE], dtype=options.dtype)
        wanted = [("passthrough", {}, (name,), name) for name in (BASE, *FIVE)]
        for count, several in ((2, FIVE[:2]), (5, FIVE)):
            for name in OPERATORS.names():
                if name != "passthrough" and (count == 2 or OPERATORS.get(name).most is None):
                    wanted.append((name, {}, several, f"{count} models"))
            wanted += [(name, given, several, f"{count} models") for name, given in EXTRA]
        rows = []
        for operator, given, names, label in wanted:
            if options.operators and operator not in options.operators:
                continue
            title = operator + "".join(f" {key} {value}" for key, value in given.items())
            title += f" ({options.dtype})" if options.dtype else ""
            row = known.get((label, title))
            if row is None:
                step = MergeStep(name=title, operator=operator, inputs=names, parameters=given)
                scored = len(names) != 2 and (options.all or operator in LIKELIHOODS)
                portion = {own.name: own.hashes for own in split.tasks[: 5 if scored else 3]}
                measured = judge.trial(step, [models[name] for name in names], bench, portion)
                row = {"models": label, "operator": title, "merge_s": round(measured.merge_seconds, 2)}
                if measured.scores is None:
                    row["failure"] = measured.failure
                else:
                    row |= columns(measured.scores, split, judge._live.tokenizer)  # type: ignore[union-attr]
                if options.out:
                    with options.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")
            rows.append(row)
            print(json.dumps(row), flush=True)
    print("\n| models | operator | SST-2 | AG News | ARC-Easy | mean | GSM8K nats | MBPP nats | merge s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        if "failure" in row:
            print(f"| {row['models']} | {row['operator']} | failed: {row['failure']} |")
            continue
        three = [row[name] for name in list(TASKS)[:3]]
        nats = [row.get("smol_gsm8k"), row.get("smol_mbpp")]
        cells = ["" if value is None else f"{value:.3f}" for value in (*three, sum(three) / 3, *nats)]
        title = "" if row["operator"] == "passthrough" else row["operator"]
        print(f"| {row['models']} | {title} | {' | '.join(cells)} | {row['merge_s']} |")


if __name__ == "__main__":
    main()
