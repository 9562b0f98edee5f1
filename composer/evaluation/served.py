"""Scoring a served composite task by task, so that a run that is killed does not score a finished task again."""

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from composer.artefacts import Store, digest
from composer.evaluation.scores import Scores, TaskScore
from composer.evaluation.tasks import Items, Split, run_tasks
from composer.progress import Progress, Step, silent
from composer.value import Value

if TYPE_CHECKING:
    from composer.serving.server import Endpoint
    from composer.serving.settings import ServeSection

VERSION = 1
"""Changes when the same composite would score otherwise."""
NO_MATTER = {
    "host", "port", "keys", "require_key", "limits", "drain_seconds", "when_down", "kv_cache_mb", "start_timeout",
}  # fmt: skip
"""Settings of the endpoint that no score depends on."""


class ServedTask(Value):
    """What a composite scored on one task through its endpoint."""

    score: TaskScore
    routed: dict[str, int]
    """How many items each expert answered."""
    seconds: float
    """What scoring took."""


class Served(Value):
    """What a composite scored on all tasks of a split through its endpoint."""

    scores: Scores
    routing: dict[str, dict[str, int]]
    """For each task: how many items each expert answered."""
    seconds: float
    """What scoring took, also where it was done by a run that was killed."""


def score_endpoint(
    endpoint: "Endpoint",
    directory: Path,
    split: Split,
    store: Store,
    *,
    serving: "ServeSection",
    batch_size: int = 16,
    progress: Progress = silent,
) -> Served:
    """Score a served composite on a split, or return what is known of tasks that were scored before.

    Args:
        endpoint: Where it answers.
        directory: The composite's directory in the store, whose name is the hash of its content.
        split: The items.
        store: Keeps each task's scores as soon as the task is done.
        serving: The recipe's `serve`.
        batch_size: Items scored at once.
        progress: Told of each task.

    Raises:
        EvaluationError: if the endpoint stops answering, or gives no log-probabilities of prompts.
    """
    from composer.evaluation.endpoint import ComposedModel
    from composer.mixture import Composite

    composite = Composite.open(directory)
    model: ComposedModel | None = None
    found: list[ServedTask] = []
    for number, items in enumerate(split.tasks):
        known = store.path("served", _key(endpoint, directory, items, split.dtype, serving) + ".json")
        progress(Step(stage="evaluate", message=f"{items.name}", done=number, total=len(split.tasks)))
        if known.is_file():
            found.append(ServedTask.load(known))
            continue
        # Not before it is needed: experts' tokenizers are loaded, and each engine is asked something.
        model = model or ComposedModel(endpoint, composite, batch_size=batch_size, dtype=split.dtype, progress=progress)
        began = time.monotonic()
        scores = run_tasks(model, replace(split, tasks=(items,)), composite.name)
        done = ServedTask(
            score=scores.task(items.name),
            routed=dict(model.routed.get(items.name, {})),
            seconds=round(time.monotonic() - began, 3),
        )
        done.save(known)
        found.append(done)
    progress(Step(stage="evaluate", message="all tasks", done=len(found), total=len(found)))
    return Served(
        scores=Scores(subject=composite.name, split=split.name, tasks=tuple(one.score for one in found)),
        routing={one.score.task: one.routed for one in found},
        seconds=sum(one.seconds for one in found),
    )


def _key(endpoint: "Endpoint", directory: Path, items: Items, dtype: str | None, serving: "ServeSection") -> str:
    """Return the hash of all that determines what a composite scores on a task."""
    return digest(
        [
            VERSION,
            directory.resolve().name,
            items.fingerprint,
            dtype,
            endpoint.engines,
            endpoint.max_model_len,
            endpoint.scores_prompts,
            serving.model_dump(exclude=NO_MATTER),
        ]
    )
