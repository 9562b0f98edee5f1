"""The corpus a predictor is trained on: one row per merge and task, with features, scores and where they come from."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from composer.errors import PredictorError, disk_errors
from composer.simmerge.features import NAMES, VERSION

if TYPE_CHECKING:
    import pandas

    from composer.simmerge.signals import Array

PREFIX = "f_"
"""Of the columns that are features."""
SINGLE = "single"
"""The arm of rows that are about a model alone."""


@dataclass(frozen=True)
class Row:
    """One merge, or one model alone, on one task."""

    zoo: str
    base: str
    """Content hash of the base, or "" without one."""
    sources: tuple[str, ...]
    """Ids, in order."""
    hashes: tuple[str, ...]
    """Their content hashes."""
    arm: str
    operator: str
    parameters: dict[str, Any]
    seed: int
    task: str
    metric: str
    score: float
    """Of the merge on the items that labels come from; a merge that failed has no row."""
    items: tuple[float, ...]
    """The same, item by item, in one order for all rows of a zoo and task."""
    source_scores: tuple[float, ...]
    """Of the sources on the same items."""
    known_scores: tuple[float, ...]
    """What the sources were expected to score, by the items that features come from (`Signals.levels`)."""
    origin_score: float
    """Of the base on the same items; nan without one."""
    labelled: bool
    """Whether labels of proxy items count among what was known; each merge is there with and without."""
    strong: int
    """Which of the sources is the strongest by what was known before."""
    parts: tuple[float, ...]
    """Effective coefficients of the sources."""
    features: tuple[float, ...]
    """In the order of `NAMES`."""


def save_corpus(rows: Iterable[Row], path: Path) -> None:
    """Write rows as a Parquet file, all or nothing.

    Raises:
        DiskFullError: if there is no room.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, list[Any]] = {}
    for row in rows:
        values = {**row.__dict__, "parameters": json.dumps(row.parameters, sort_keys=True), "version": VERSION}
        values |= {PREFIX + name: value for name, value in zip(NAMES, values.pop("features"), strict=True)}
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
    small = {name: pa.array(column, pa.float32()) for name, column in columns.items() if name.startswith(PREFIX)}
    lists = ("items", "source_scores", "known_scores", "parts")
    small |= {name: pa.array(columns[name], pa.list_(pa.float32())) for name in lists}
    table = pa.table({name: small.get(name, column) for name, column in columns.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with disk_errors(path):
        pq.write_table(table, partial, compression="zstd")
        partial.replace(path)


def load_corpus(paths: Sequence[Path]) -> "pandas.DataFrame":
    """Read corpora into one table; a merge that is in two of them counts once.

    Raises:
        PredictorError: if a file is none, or its features are of another version.
    """
    import pandas

    tables = []
    for path in paths:
        try:
            table = pandas.read_parquet(path)
        except (OSError, ValueError) as error:
            raise PredictorError(f"{path} is no corpus: {error}") from error
        known = set(table["version"].unique()) if "version" in table else set()
        if known != {VERSION}:
            raise PredictorError(
                f"{path} has features of version {', '.join(map(str, sorted(known))) or 'none'}, "
                f"this program knows {VERSION}; make it again with 'model-composer simmerge collect'"
            )
        tables.append(table)
    whole = pandas.concat(tables, ignore_index=True)
    key = whole["hashes"].map(tuple).astype(str) + whole["arm"] + whole["task"]
    key += whole["seed"].astype(str) + whole["labelled"].astype(str)
    return whole[~key.duplicated()].reset_index(drop=True)


def matrix(table: "pandas.DataFrame") -> "Array":
    """Return the features of a table's rows, `[rows, features]` in the order of `NAMES`."""
    found: Array = table[[PREFIX + name for name in NAMES]].to_numpy(dtype=np.float64)
    return found
