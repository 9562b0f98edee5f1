"""Why a merge is predicted to be what it is: what each feature adds, in words and as a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from composer.errors import MergeError, disk_errors
from composer.merging.plan import Forecast
from composer.simmerge.advisor import STRANGE, Advisor, forecast
from composer.simmerge.features import FEATURES, NAMES
from composer.simmerge.planner import Weighed
from composer.value import Value
from composer.zoo import Checkpoint

if TYPE_CHECKING:
    from composer.simmerge.planner import Planner

SHOWN = 8
"""Features that are told of."""
RUNNERS_UP = 5
"""Merges that are told of besides the chosen one."""


class Reason(Value):
    """What one feature adds to a prediction."""

    feature: str
    summary: str
    value: float | None
    """Mean over tasks; None if it is not known."""
    effect: float
    """What it adds to the predicted gain over the strongest source, mean over tasks (TreeSHAP)."""


class Explanation(Value):
    """Why one merge is chosen."""

    best: str
    """The best single model."""
    reference: float
    """What it is expected to score."""
    chosen: Forecast
    others: tuple[Forecast, ...]
    """The next best ways."""
    reasons: tuple[Reason, ...]
    """The largest effects first."""

    def in_words(self) -> str:
        """Return the explanation for people."""
        one = self.chosen
        lines = [
            f"{one.label} of {', '.join(one.inputs)}: {one.gain:+.4f} predicted against {self.best} "
            f"({self.reference:.4f}), {one.low:+.4f} to {one.high:+.4f}; a gain with probability {one.chance:.2f}",
            "by task: " + ", ".join(f"{task} {score:.3f}" for task, score in one.by_task.items()),
        ]
        if one.novelty > STRANGE:
            lines.append(
                f"unlike what the predictor was trained on ({one.novelty:.0%} of what it goes by is out of range)"
            )
        lines.append("what speaks for it and against it, beside what its models score:")
        for reason in self.reasons:
            value = "not known" if reason.value is None else f"{reason.value:.3g}"
            lines.append(f"  {reason.effect:+.4f}  {reason.feature} {value}: {reason.summary}")
        lines.append("other ways:")
        lines += [f"  {other.gain:+.4f}  {other.label} of {', '.join(other.inputs)}" for other in self.others]
        return "\n".join(lines)


def explain_merges(advisor: Advisor, models: Sequence[Checkpoint]) -> Explanation:
    """Weigh the merges of all of some models and explain the best.

    Raises:
        MergeError: if no operator takes them.
    """
    planner = advisor.planner(models)
    everyone = [
        one for one in planner.search(advisor.arms(based=planner.signals.based)) if len(one.sources) == len(models)
    ]
    if not everyone:
        raise MergeError(f"no operator takes {', '.join(one.id for one in models)} together")
    ways: dict[str, Weighed] = {}
    for one in everyone:
        ways.setdefault(one.arm.operator, one)
    chosen, *others = ways.values()
    names, tasks = planner.signals.ids, planner.tasks
    return Explanation(
        best=names[planner.best],
        reference=planner.reference,
        chosen=forecast(chosen, names, tasks),
        others=tuple(forecast(one, names, tasks) for one in others[:RUNNERS_UP]),
        reasons=_reasons(planner, chosen),
    )


def _reasons(planner: "Planner", one: Weighed) -> tuple[Reason, ...]:
    features = np.stack(list(planner.features(one.sources, one.arm).values()))
    effects = planner.predictor.reasons(features).mean(axis=0)
    found = []
    for place in np.argsort(-np.abs(effects), kind="stable")[:SHOWN]:
        known = features[:, place][np.isfinite(features[:, place])]
        name = NAMES[int(place)]
        value = float(known.mean()) if len(known) else None
        found.append(Reason(feature=name, summary=FEATURES[name].summary, value=value, effect=float(effects[place])))
    return tuple(found)


def draw_explanation(explanation: Explanation, path: Path) -> None:
    """Draw effects as bars, and predicted gains with their intervals.

    Raises:
        DiskFullError: if there is no room.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    reasons = explanation.reasons[::-1]
    colours = ["#2a7f62" if one.effect > 0 else "#b3423a" for one in reasons]
    left.barh([one.feature for one in reasons], [one.effect for one in reasons], color=colours)
    left.axvline(0, color="#444", linewidth=0.8)
    left.set_title(f"{explanation.chosen.label}: what adds to its gain")
    ways = [explanation.chosen, *explanation.others][::-1]
    for place, way in enumerate(ways):
        right.plot([way.low, way.high], [place, place], color="#8aa", linewidth=3)
        right.plot([way.gain], [place], "o", color="#24527a")
    right.set_yticks(range(len(ways)), [way.label for way in ways])
    right.axvline(0, color="#444", linewidth=0.8)
    right.set_title(f"predicted gain over {explanation.best}")
    with disk_errors(path):
        figure.savefig(path, dpi=120)
