"""The graph of a run: its stages, how far each is and how long it took, from the run's log."""

from collections.abc import Sequence
from typing import Any, Literal

from composer.planning import Plan
from composer.runs import AGAIN, Run
from composer.value import Value

STAGES = (
    "inspect", "compare", "cluster", "plan", "approve", "prepare", "merge", "mix", "serve", "evaluate", "report",
)  # fmt: skip
"""The nodes of the compose graph, in order; `merge` has a branch for each cluster."""

State = Literal["ahead", "going", "waiting", "done", "stopped"]


class Stage(Value):
    """One stage of a run, or one branch of its merge stage."""

    name: str
    cluster: str = ""
    state: State = "ahead"
    seconds: float | None = None


def stages_of(run: Run | None, *, going: bool, now: float) -> tuple[Stage, ...]:
    """Return all stages of a run.

    Args:
        run: The run; None for one that is not known yet.
        going: Whether it is worked on; what was begun and not finished has else been stopped.
        now: The time, in seconds since the epoch.
    """
    events = _last_attempt(run.events()) if run else []
    found = []
    for name in STAGES:
        branches = _clusters(run) if run and name == "merge" else ()
        for cluster in branches or ("",):
            found.append(_stage(name, cluster, events, going=going, now=now))
    planned = any(one.name == "plan" and one.state == "done" for one in found)
    return tuple(_approval(one) if planned and one.name == "approve" else one for one in found)


def _last_attempt(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    begun = [place for place, event in enumerate(events) if event["event"] == AGAIN]
    return list(events[begun[-1] + 1 :] if begun else events)


def _clusters(run: Run) -> tuple[str, ...]:
    file = run.path / "plan.json"
    return tuple(merge.cluster for merge in Plan.load(file).merges) if file.is_file() else ()


def _stage(name: str, cluster: str, events: Sequence[dict[str, Any]], *, going: bool, now: float) -> Stage:
    mine = [
        event
        for event in events
        if event["stage"] == name and event.get("cluster", "") == cluster and event["event"] in ("started", "finished")
    ]
    if not mine:
        return Stage(name=name, cluster=cluster)
    last = mine[-1]
    if last["event"] == "finished":
        return Stage(name=name, cluster=cluster, state="done", seconds=last.get("seconds"))
    seconds = now - last["time"] if going else None
    return Stage(name=name, cluster=cluster, state="going" if going else "stopped", seconds=seconds)


def _approval(stage: Stage) -> Stage:
    return stage.model_copy(update={"state": "waiting"}) if stage.state == "ahead" else stage
