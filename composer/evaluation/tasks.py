"""Tasks and their two splits: proxy items for choosing, held-out items for reporting.

A task that has validation and test splits gives them as proxy and held-out. Where there is one split only,
each item falls on one side by a hash of its content, so position and order never matter.
"""

import inspect
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from composer.artefacts import digest
from composer.errors import EvaluationError, first_line
from composer.evaluation.sandbox import check, pass_at_1
from composer.evaluation.scores import Scores, TaskScore
from composer.evaluation.settings import EvaluateSection
from composer.registry import nearest

FEWSHOT_SEED = 1234
"""lm-eval's own; unseeded, every model would be shown other examples, and comparisons would not be paired."""

IN_SANDBOX = f"{pass_at_1.__module__}.{pass_at_1.__name__}"
"""The one metric that may run generated code, as a task's YAML names it."""
METRIC_KEYS = ("metric", "aggregation", "higher_is_better", "seconds", "memory_mb")
"""What may stand beside it."""


@dataclass(frozen=True)
class Items:
    """The items of one task that belong to one split."""

    task: Any
    """The lm-eval task, whose evaluation documents the indices refer to."""
    metric: str
    indices: tuple[int, ...]
    hashes: tuple[str, ...]
    """Content hashes, in the same order."""

    @property
    def name(self) -> str:
        """The task's name."""
        return str(self.task.config.task)

    def only(self, chosen: Collection[str]) -> "Items":
        """Return those of the items that have one of some hashes."""
        kept = [place for place, item in enumerate(self.hashes) if item in chosen]
        indices = tuple(self.indices[place] for place in kept)
        return replace(self, indices=indices, hashes=tuple(self.hashes[place] for place in kept))

    @property
    def fingerprint(self) -> str:
        """Hash of everything that determines the scores besides the model."""
        return digest([_described(self.task.dump_config()), self.metric, sorted(self.hashes)])


@dataclass(frozen=True)
class Split:
    """One split of all tasks."""

    name: str
    tasks: tuple[Items, ...]
    dtype: str | None = None
    """What models are computed in; by default float32 on a CPU, their own type on a GPU."""

    @property
    def size(self) -> int:
        """Number of items over all tasks."""
        return sum(len(task.indices) for task in self.tasks)

    @property
    def fingerprint(self) -> str:
        """Hash of all items and task definitions, and of what is computed in if that is not the default."""
        return digest([*(task.fingerprint for task in self.tasks), *([self.dtype] if self.dtype else [])])


def load_split(
    names: list[str],
    split: str,
    *,
    include: str | None = None,
    proxy: float = 0.5,
    limit: int | None = None,
    seed: int = 0,
    dtype: str | None = None,
    sandbox: bool = False,
) -> Split:
    """Load one split of some lm-eval tasks; the other split's items are not touched beyond their hashes.

    Args:
        names: lm-eval task names.
        split: "proxy" or "held_out".
        include: A folder with task YAMLs of one's own.
        proxy: Share of proxy items in tasks that have a single split.
        limit: At most this many items a task, those of the lowest hash.
        seed: Mixed into the hashes.
        dtype: What models are computed in.
        sandbox: Whether tasks may run generated code, in `composer.evaluation.sandbox` and nowhere else.

    Raises:
        EvaluationError: for unknown tasks, groups, a split without items, or code that may not or cannot run.
    """
    manager = _manager(include, defaults=False) if include else None
    if manager is None or any(name not in manager.all_tasks for name in names):
        manager = _manager(include, defaults=True)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        hint = nearest(unknown[0], list(manager.all_tasks))
        where = f" (evaluate.include: {include})" if include else " (evaluate.include names no folder of your own)"
        raise EvaluationError(f"there is no task '{unknown[0]}'{hint}{where}")
    code = [name for name in names if runs_code(manager, name, allowed=sandbox)]
    if code:
        check()
    return Split(split, tuple(_items(manager, name, split, proxy, limit, seed) for name in names), dtype)


def split_of(section: EvaluateSection, split: str) -> Split:
    """Load one split as the recipe's `evaluate` says.

    Raises:
        EvaluationError: as `load_split`.
    """
    return load_split(
        section.tasks,
        split,
        include=section.include,
        proxy=section.proxy,
        limit=section.proxy_limit if split == "proxy" else section.held_out_limit,
        seed=section.seed,
        dtype=section.dtype,
        sandbox=section.sandbox,
    )


def part_of(split: Split, start: float, stop: float) -> Split:
    """Return a part of every task's items, from one share of them to another, in the order of their hashes.

    Raises:
        EvaluationError: if a task has no item there.
    """
    parts = []
    for items in split.tasks:
        ranked = sorted(items.hashes)
        chosen = set(ranked[round(start * len(ranked)) : round(stop * len(ranked))])
        if not chosen:
            raise EvaluationError(f"task '{items.name}' has too few items, {len(ranked)}, to take a part of them")
        parts.append(items.only(chosen))
    return replace(split, tasks=tuple(parts))


@lru_cache
def _manager(include: str | None, *, defaults: bool) -> Any:
    """Return lm-eval's index of tasks; its own tasks are thousands of files, read only if they are asked for."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include, include_defaults=defaults)


def _items(manager: Any, name: str, split: str, proxy: float, limit: int | None, seed: int) -> Items:
    task = _load(manager, name)
    config = task.config
    own_splits = bool(config.validation_split and config.test_split)
    if own_splits and split == "proxy":
        config.test_split = config.validation_split  # lm-eval always scores the test split
    chosen: dict[str, int] = {}
    for index, document in enumerate(task.eval_docs):
        item = digest([seed, _plain(document)])
        mine = own_splits or ((int(item[:13], 16) / 16**13 < proxy) == (split == "proxy"))
        if mine:
            chosen.setdefault(item, index)
    kept = sorted(chosen)[:limit]
    if not kept:
        raise EvaluationError(f"task '{name}' has no items in its {split} split")
    order = sorted(kept, key=lambda item: chosen[item])
    metrics = config.metric_list or []
    metric = metrics[0]["metric"] if metrics else "acc"
    metric = getattr(metric, "__name__", metric)  # a function of the task's own, or ours
    if not task.higher_is_better().get(metric, True):
        raise EvaluationError(
            f"task '{name}': its first metric, {metric}, is better when lower; put one first that is better higher"
        )
    return Items(task=task, metric=metric, indices=tuple(chosen[item] for item in order), hashes=tuple(order))


def runs_code(manager: Any, name: str, *, allowed: bool) -> bool:
    """Return whether a task runs generated code; found in its description, before any Python of it is imported.

    (Some of lm-eval's own run code as soon as they are imported.)

    Raises:
        EvaluationError: if it does and may not, or would run it elsewhere than in our sandbox.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    path = manager.task_index[name].yaml_path
    described = load_yaml(path, resolve_func=False) if path else {}
    metrics = [str(one.get("metric")).rpartition("/")[2] for one in described.get("metric_list") or []]
    if not described.get("unsafe_code") and IN_SANDBOX not in metrics:
        return False
    others = [one for one in metrics if one != IN_SANDBOX]
    if described.get("process_results"):
        others.append("process_results")
    if others or not metrics:
        raise EvaluationError(
            f"task '{name}' runs generated code by {others[0] if others else 'a metric of its own'}, outside of any "
            f"sandbox; write it with 'metric: !function {IN_SANDBOX}' alone (docs/evaluation.md), or choose another one"
        )
    for key, value in described["metric_list"][0].items():
        if key not in METRIC_KEYS:
            raise EvaluationError(f"task '{name}': the metric {IN_SANDBOX} has no '{key}' ({', '.join(METRIC_KEYS)})")
        if key in ("seconds", "memory_mb") and (type(value) not in (int, float) or value <= 0):
            raise EvaluationError(f"task '{name}': {key} of the metric is {value!r}; give a number above 0")
    if not allowed:
        raise EvaluationError(
            f"task '{name}' runs code that models write; 'evaluate: {{sandbox: true}}' in the recipe allows that, in a "
            "sandbox; or choose another one"
        )
    return True


def shut_in(task: Any) -> bool:
    """Return whether a loaded task runs no generated code, or in our sandbox only."""
    metrics = [one["metric"] for one in getattr(task.config, "metric_list", None) or []]
    return not getattr(task, "UNSAFE_CODE", False) or metrics == [pass_at_1]


def _load(manager: Any, name: str) -> Any:
    try:
        loaded = manager.load([name])["tasks"]
    except Exception as error:  # a task's own code and data loaders may raise anything
        message = first_line(error)
        raise EvaluationError(f"task '{name}' cannot be loaded: {message}") from error
    if len(loaded) != 1:
        raise EvaluationError(f"'{name}' is a group of tasks; list its tasks one by one")
    task = next(iter(loaded.values()))
    if not shut_in(task):
        raise EvaluationError(f"task '{name}' runs generated code in a way that its YAML does not tell; choose another")
    return task


def _plain(document: Any) -> Any:
    """Return a document as JSON-serialisable data."""
    if isinstance(document, dict):
        return {str(key): _plain(value) for key, value in document.items()}
    if isinstance(document, (list, tuple)):
        return [_plain(value) for value in document]
    return document if isinstance(document, (str, int, float, bool)) or document is None else str(document)


def _described(value: Any) -> Any:
    """Return a task's configuration as JSON-serialisable data, functions by their text."""
    if isinstance(value, dict):
        return {key: _described(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_described(one) for one in value]
    if not callable(value):
        return value
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):  # not every callable has a text
        return f"{value.__module__}.{value.__qualname__}"


def run_tasks(model: Any, split: Split, subject: str) -> Scores:
    """Score an lm-eval model on every item of a split.

    Raises:
        EvaluationError: if a task's metric has no number per item.
    """
    from lm_eval.evaluator import evaluate

    tasks = {items.name: items.task for items in split.tasks}
    for task in tasks.values():
        task._instances = None  # lm-eval leaves the last model's requests on the task
        task.set_fewshot_seed(FEWSHOT_SEED)
    samples = {items.name: list(items.indices) for items in split.tasks}
    results = evaluate(
        lm=model,
        task_dict=tasks,
        samples=samples,
        bootstrap_iters=0,
        log_samples=True,
        confirm_run_unsafe_code=all(map(shut_in, tasks.values())),
    )
    return Scores(
        subject=subject,
        split=split.name,
        tasks=tuple(task_score(items, results["samples"][items.name]) for items in split.tasks),
    )


def task_score(items: Items, rows: list[dict[str, Any]]) -> TaskScore:
    """Return the metric of each item from lm-eval's rows, which give an item by its place in the task's documents.

    Raises:
        EvaluationError: if the metric is no number.
    """
    by_index = dict(zip(items.indices, items.hashes, strict=True))
    values: dict[str, float] = {}
    for row in rows:
        value = row.get(items.metric)
        if not isinstance(value, (int, float)):
            raise EvaluationError(
                f"task '{items.name}': metric {items.metric} gives no number per item; list another one first"
            )
        values.setdefault(by_index[row["doc_id"]], float(value))  # of several filters the first counts
    return TaskScore(task=items.name, metric=items.metric, items=values)
