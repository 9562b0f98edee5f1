"""The stages of a run, as a graph that moves."""

import time
from typing import Any

from nicegui import ui

from composer.ui.look import PRE, TEXT
from composer.ui.stages import Stage, stages_of
from composer.ui.views import plain
from composer.ui.work import Work

ICONS = {
    "ahead": ("radio_button_unchecked", "text-gray-400"),
    "going": ("autorenew", "text-primary animate-spin"),
    "waiting": ("pan_tool", "text-amber-700"),
    "done": ("check_circle", "text-primary"),
    "stopped": ("pause_circle", "text-red-700"),
}


class Graph:
    """The stages of the run, live."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self._drawn: tuple[Any, ...] = ()

    def build(self) -> None:
        """Lay it out."""
        self.title = ui.label().classes("font-medium")
        self.flow = ui.row().classes("w-full items-center gap-x-1 gap-y-2").props("data-part=graph")
        self.now = ui.label().classes(f"{TEXT} text-sm").props("data-part=now")
        self.bar = ui.linear_progress(value=0, show_value=False, size="8px").props("rounded instant-feedback")
        self.log = ui.label().classes(f"{PRE} text-gray-600").props("data-part=log")

    def refresh(self) -> None:
        """Show how far the run is."""
        work = self.work
        run, step = work.run, work.step
        going = work.running
        stages = stages_of(run, going=going, now=time.time())
        self.title.text = f"Run {plain(run.name)}" if run else "No run yet: these are the stages that one goes through"
        self.now.text = self._in_words(stages, going)
        self.log.text = "\n".join(f"{one.stage}: {plain(one.message)}" for one in work.steps[:-1])
        counted = bool(going and step and step.total)
        self.bar.visible = counted
        if counted and step is not None:
            self.bar.value = (step.done or 0) / (step.total or 1)
        shape = tuple((one.name, one.cluster, one.state) for one in stages)
        if shape != self._drawn:
            self._drawn = shape
            self._draw(stages)
        for one, label in zip(stages, self._times, strict=True):
            label.text = seconds(one.seconds)

    def _in_words(self, stages: tuple[Stage, ...], going: bool) -> str:
        step = self.work.step
        if going and step is not None:
            count = f" ({step.done} of {step.total})" if step.total else ""
            return f"{step.stage}: {plain(step.message)}{count}"
        states = {one.state for one in stages}
        if "stopped" in states:
            return "Stopped; 'run' in the chat carries on from here."
        if "waiting" in states:
            return "The plan waits for a yes."
        return "Done." if states == {"done"} else ""

    def _draw(self, stages: tuple[Stage, ...]) -> None:
        self.flow.clear()
        self._times: list[ui.label] = []
        with self.flow:
            for place, name in enumerate(dict.fromkeys(one.name for one in stages)):
                if place:
                    ui.icon("arrow_forward").classes("text-gray-400")
                with ui.column().classes("gap-1"):
                    for one in stages:
                        if one.name == name:
                            self._times.append(self._box(one))

    def _box(self, stage: Stage) -> ui.label:
        icon, colour = ICONS[stage.state]
        edge = "border-cyan-700" if stage.state in ("going", "waiting") else "border-gray-300"
        box = ui.row().classes(f"items-center gap-2 no-wrap border rounded-lg px-2 py-1 bg-white {edge}")
        with box.props(f"data-stage={stage.name} data-state={stage.state}"):
            ui.icon(icon).classes(colour).props(f'role=img aria-label="{stage.state}"')
            with ui.column().classes("gap-0"):
                ui.label(stage.name + (f" {plain(stage.cluster)}" if stage.cluster else "")).classes(
                    "text-sm leading-4"
                )
                return ui.label().classes("text-xs text-gray-600 leading-4")


def seconds(value: float | None) -> str:
    """Return a duration in few characters."""
    if value is None:
        return "–"
    return f"{value:.1f} s" if value < 60 else f"{value // 60:.0f} min {value % 60:.0f} s"
