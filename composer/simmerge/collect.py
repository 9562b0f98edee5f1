"""Collecting a corpus: merges are made in memory, scored on every task, and described by what was known before.

Every score is kept as soon as it is measured, so a collection that was killed goes on where it was.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import nan
from pathlib import Path
from typing import Any

import numpy as np

from composer.artefacts import Store
from composer.evaluation.scores import Scores
from composer.evaluation.tasks import Split
from composer.executors import Executor
from composer.merging.judge import Bench, Judge
from composer.merging.plan import MergeStep
from composer.merging.trials import TrialLog, trial_key
from composer.probes import ProbesSection
from composer.progress import Progress, Step, silent
from composer.simmerge.arms import Arm
from composer.simmerge.corpus import SINGLE, Row, save_corpus
from composer.simmerge.features import NAMES, merge_features
from composer.simmerge.footprint import footprint, take_sample
from composer.simmerge.signals import gather
from composer.zoo import Checkpoint

KNOWN = 1 / 3
"""The share of proxy items whose answers features may use; labels come from the others."""
TOGETHER = 8
"""Merges that are handed to the executor at a time."""


@dataclass(frozen=True)
class Candidate:
    """A merge to be made."""

    sources: tuple[int, ...]
    """Numbers of the models, in order."""
    arm: Arm
    step: MergeStep


def draw(ids: Sequence[str], arms: Sequence[Arm], *, pairs: int, several: int, seed: int) -> list[Candidate]:
    """Draw merges: every arm for some pairs, one arm each for some groups of three and four.

    Args:
        ids: The models.
        arms: The ways of merging.
        pairs: Pairs at most.
        several: Groups of three and four.
        seed: Of the drawing.
    """
    dice = random.Random(seed)  # noqa: S311
    every = list(combinations(range(len(ids)), 2))
    dice.shuffle(every)
    chosen: list[tuple[tuple[int, ...], Arm]] = []
    for pair in every[:pairs]:
        for arm in arms:
            order = list(pair)
            dice.shuffle(order)
            chosen.append((tuple(order), arm))
    wide = [arm for arm in arms if len(arm.steps(("a", "b", "c"), "m")) == 1]  # a chain would have to be written
    for number in range(several if len(ids) > 3 else 0):
        chosen.append((tuple(dice.sample(range(len(ids)), 3 + number % 2)), dice.choice(wide)))
    return [candidate(ids, sources, arm) for sources, arm in chosen]


def candidate(ids: Sequence[str], sources: tuple[int, ...], arm: Arm) -> Candidate:
    """Return the merge of some models by an arm that takes them all at once."""
    [step] = arm.steps([ids[one] for one in sources], "candidate")
    return Candidate(sources, arm, step)


def collect(
    name: str,
    models: Sequence[Checkpoint],
    base: Checkpoint | None,
    candidates: Sequence[Candidate],
    known: Split,
    labels: Split,
    probes: ProbesSection,
    store: Store,
    executor: Executor[Judge],
    out: Path,
    *,
    dtype: str | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> int:
    """Make and score what has not been made yet, and write the corpus.

    Args:
        name: What the zoo is called in the corpus.
        models: Members of one cluster.
        base: What they were fine-tuned from, if it is known.
        candidates: What is made of them.
        known: Items whose answers features may use.
        labels: Items that scores come from; the executor's judges score on them as "proxy".
        probes: Texts that belong to no task.
        store: Keeps scores, records and moments.
        executor: Makes and scores merges.
        out: The Parquet file.
        dtype: Storage type of merges.
        seed: Of random masks.
        progress: Told of each merge.

    Returns:
        The number of rows written.
    """
    bench = Bench(base=base, dtype=dtype, seed=seed)
    alone = [*models, *([base] if base else [])]
    scores = dict(zip([one.id for one in alone], executor.map("score", [(one,) for one in alone]), strict=True))
    log = TrialLog(store.root / "trials.sqlite")
    found: dict[int, Scores] = {}
    try:
        keys = [
            trial_key(one.step, [models[place] for place in one.sources], bench, labels.fingerprint)
            for one in candidates
        ]
        missing = [place for place, key in enumerate(keys) if log.get(key) is None]
        for start in range(0, len(missing), TOGETHER):
            turn = missing[start : start + TOGETHER]
            calls = [(candidates[one].step, [models[n] for n in candidates[one].sources], bench, None) for one in turn]
            for done, (place, measured) in enumerate(zip(turn, executor.map("trial", calls), strict=True), start + 1):
                log.put(keys[place], name, candidates[place].step, measured)
                message = f"{candidates[place].arm.label}({', '.join(candidates[place].step.inputs)})"
                progress(Step(stage="collect", message=message, done=done, total=len(missing)))
        for place, key in enumerate(keys):
            measured = log.get(key)
            if measured is not None and measured.scores is not None:
                found[place] = measured.scores
    finally:
        log.close()
    rows = _rows(name, models, base, candidates, found, scores, known, labels, probes, store, seed, progress)
    save_corpus(rows, out)
    return len(rows)


def _rows(
    name: str,
    models: Sequence[Checkpoint],
    base: Checkpoint | None,
    candidates: Sequence[Candidate],
    found: dict[int, Scores],
    scores: dict[str, Scores],
    known: Split,
    labels: Split,
    probes: ProbesSection,
    store: Store,
    seed: int,
    progress: Progress,
) -> list[Row]:
    signals = gather(models, base, known, probes, store, progress)
    sample = take_sample(models, base)
    places = sorted(found)
    parts, residual = np.zeros((len(places), len(models))), np.zeros(len(places))
    for number, place in enumerate(places):
        one = candidates[place]
        own, residual[number] = footprint(one.step.operator, one.step.parameters, one.sources, sample, seed=seed)
        parts[number, list(one.sources)] = own
    rows: list[Row] = []
    shared: dict[str, Any] = {"zoo": name, "base": base.content_hash if base else "", "seed": seed}
    for items in labels.tasks:
        order = sorted(items.hashes)

        def values(subject: Scores, order: list[str] = order, task: str = items.name) -> tuple[float, ...]:
            return tuple(subject.task(task).items[item] for item in order)

        task: dict[str, Any] = {**shared, "task": items.name, "metric": items.metric}
        task["origin_score"] = scores[base.id].task(items.name).mean if base else nan
        before = np.append(signals.levels(items.name), nan)  # the base is no model of the cluster
        for place, model in enumerate([*models, *([base] if base else [])]):
            own_score = scores[model.id].task(items.name).mean
            rows.append(
                Row(
                    sources=(model.id,),
                    hashes=(model.content_hash,),
                    arm=SINGLE,
                    operator="",
                    parameters={},
                    score=own_score,
                    items=values(scores[model.id]),
                    source_scores=(own_score,),
                    known_scores=(float(before[place]),),
                    labelled=True,
                    strong=0,
                    parts=(1.0,),
                    features=(nan,) * len(NAMES),
                    **task,
                )
            )
        for labelled in (True, False):
            features, strong = merge_features(signals, items.name, parts, residual, labelled=labelled)
            for number, place in enumerate(places):
                one = candidates[place]
                rows.append(
                    Row(
                        sources=one.step.inputs,
                        hashes=tuple(models[n].content_hash for n in one.sources),
                        arm=one.arm.label,
                        operator=one.step.operator,
                        parameters=json.loads(json.dumps(one.step.parameters)),
                        score=found[place].task(items.name).mean,
                        items=values(found[place]),
                        source_scores=tuple(scores[model].task(items.name).mean for model in one.step.inputs),
                        known_scores=tuple(before[list(one.sources)]),
                        labelled=labelled,
                        strong=one.sources.index(int(strong[number])),
                        parts=tuple(parts[number, list(one.sources)]),
                        features=tuple(features[number]),
                        **task,
                    )
                )
    return rows
