"""The log of a search: every candidate that was scored, item by item, in SQLite.

It is what makes a search resumable: strategies decide by nothing but what candidates scored, so a search that was
killed goes the same way again, through what is known, to where it was.
"""

import json
import sqlite3
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from composer.artefacts import digest
from composer.errors import MergeError, disk_errors
from composer.evaluation.scores import Scores
from composer.merging.cost import SearchCost
from composer.merging.engine.merge import dtype_of, lineage_of, merge_key, vocabularies_differ
from composer.merging.judge import Bench, Measured, Portion
from composer.merging.plan import MergeStep
from composer.zoo import Checkpoint

_SCHEMA = """
CREATE TABLE IF NOT EXISTS trials (
    key TEXT PRIMARY KEY,      -- hash of the merge and of the proxy items
    cluster TEXT, name TEXT, operator TEXT, inputs TEXT, parameters TEXT,
    score REAL,                -- mean over tasks, of the items scored so far
    items INTEGER,
    failure TEXT,
    merge_seconds REAL, score_seconds REAL, time REAL,
    scores TEXT                -- items and their values, as JSON
)
"""


def trial_key(step: MergeStep, inputs: Sequence[Checkpoint], bench: Bench, fingerprint: str) -> str:
    """Return what a candidate is known by: the merge, the items it is scored on, and what scores it.

    Args:
        step: The candidate.
        inputs: Its inputs, in order.
        bench: What it has in common with others.
        fingerprint: Hash of the items and their tasks.
    """
    try:
        lineage = lineage_of(step, inputs, bench.base, bench.seed, bench.texts)
    except MergeError as error:  # cannot be made: known by what is wrong with it
        return digest(["refused", str(error), [one.content_hash for one in inputs], fingerprint])
    models = [*inputs, *([bench.base] if bench.base is not None and lineage.base else [])]
    tokenizer = bench.tokenizer if vocabularies_differ(models) else None
    scorer = [] if bench.scorer == "torch" else [bench.scorer]  # others differ in the last digits
    return digest([merge_key(lineage, dtype_of(bench.dtype, inputs), tokenizer), fingerprint, *scorer])


class TrialLog:
    """Trials by key; one process writes."""

    def __init__(self, path: Path) -> None:
        """Open the log, or begin it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with disk_errors(path):
            self._base = sqlite3.connect(path, timeout=60, isolation_level=None)
            self._base.execute("PRAGMA journal_mode=WAL")
            self._base.execute(_SCHEMA)
        self._path = path

    def get(self, key: str) -> Measured | None:
        """Return what is known of a candidate."""
        row = self._base.execute(
            "SELECT scores, failure, merge_seconds, score_seconds FROM trials WHERE key = ?", (key,)
        ).fetchone()
        if row is None:
            return None
        scores = Scores.model_validate_json(row[0]) if row[0] else None
        return Measured(scores=scores, failure=row[1], merge_seconds=row[2], score_seconds=row[3])

    def put(self, key: str, cluster: str, step: MergeStep, measured: Measured) -> None:
        """Keep what is known of a candidate.

        Raises:
            DiskFullError: if there is no room.
        """
        scores = measured.scores
        row = (
            key,
            cluster,
            step.name,
            step.operator,
            json.dumps(step.inputs),
            json.dumps(step.parameters),
            scores.mean if scores else None,
            sum(len(task.items) for task in scores.tasks) if scores else 0,
            measured.failure,
            measured.merge_seconds,
            measured.score_seconds,
            time.time(),
            scores.model_dump_json() if scores else None,
        )
        with disk_errors(self._path):
            self._base.execute(f"INSERT OR REPLACE INTO trials VALUES ({', '.join('?' * len(row))})", row)  # noqa: S608

    def cost(self, keys: Collection[str]) -> SearchCost:
        """Return what the candidates of some keys took, as far as they are known."""
        found = [
            SearchCost(tried=1, failed=failed, items=items, merge_seconds=merge, score_seconds=score)
            for key in keys
            for items, failed, merge, score in self._base.execute(
                "SELECT items, failure IS NOT NULL, merge_seconds, score_seconds FROM trials WHERE key = ?", (key,)
            )
        ]
        return SearchCost.total(found)

    def close(self) -> None:
        """Close the log."""
        self._base.close()


def without(portion: Portion, scores: Scores | None) -> Portion:
    """Return the items of a portion that have not been scored."""
    known = {task.task: task.items for task in scores.tasks} if scores else {}
    left = {name: tuple(item for item in items if item not in known.get(name, {})) for name, items in portion.items()}
    return {name: items for name, items in left.items() if items}


def within(portion: Portion, scores: Scores) -> Scores:
    """Return scores on the items of a portion only."""
    tasks = []
    for task in scores.tasks:
        wanted = set(portion.get(task.task, ()))
        tasks.append(task.model_copy(update={"items": {i: value for i, value in task.items.items() if i in wanted}}))
    return scores.model_copy(update={"tasks": tuple(task for task in tasks if task.items)})


def joined(first: Measured | None, second: Measured) -> Measured:
    """Return two measurements of one candidate as one; a failure stays one."""
    if first is None or first.scores is None or second.scores is None:
        return second
    tasks = {task.task: task for task in first.scores.tasks}
    for task in second.scores.tasks:
        before = tasks.get(task.task)
        items = {**(before.items if before else {}), **task.items}
        tasks[task.task] = task.model_copy(update={"items": items})
    return Measured(
        scores=second.scores.model_copy(update={"tasks": tuple(tasks.values())}),
        merge_seconds=first.merge_seconds + second.merge_seconds,
        score_seconds=first.score_seconds + second.score_seconds,
    )
