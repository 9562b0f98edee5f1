"""The tabs beside the chat: the run, the plan, the zoo, the evidence, the playground."""

from typing import Any

from nicegui import run as thread
from nicegui import ui

from composer.chat import calls
from composer.chat.answers import plan_in_words
from composer.planning import Plan
from composer.runs import Run
from composer.ui import views
from composer.ui.editor import RecipeEditor
from composer.ui.graph import Graph
from composer.ui.look import NOTE, PRE, TEXT, answers, asked, figure, small_table, tried
from composer.ui.playground import Playground
from composer.ui.views import plain
from composer.ui.work import Work
from composer.zoo.checkpoint import Zoo

TABS = {"run": "account_tree", "plan": "fact_check", "zoo": "hub", "evidence": "query_stats", "playground": "forum"}
"""With their icons."""
NUMBERS = ("parameters", "layers")
"""Columns that are set to the right."""


class Side:
    """The tabs beside the chat."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.graph, self.play = Graph(work), Playground(work)
        self.recipe = RecipeEditor(work)
        self._drawn: object = None
        self._zoo: Any = None
        self._found: Any = ""

    def build(self) -> None:
        """Lay them out."""
        with ui.tabs().props("dense no-caps outside-arrows mobile-arrows align=left").classes("w-full") as self.tabs:
            for name, icon in TABS.items():
                ui.tab(name, label=name.capitalize(), icon=icon).classes("px-2")
        panels = ui.tab_panels(self.tabs, value="zoo", animated=False, keep_alive=False)
        with panels.classes("w-full grow min-h-0 lg:overflow-y-auto"):
            with self._panel("run"):
                self.graph.build()
            with self._panel("plan"):
                self.plan = ui.column().classes("w-full gap-3").props("data-part=plan")
                self.recipe.build()
            with self._panel("zoo"):
                self.table = ui.column().classes("w-full")
                self.zoo = ui.column().classes("w-full gap-3").props("data-part=zoo")
            with self._panel("evidence"):
                self.evidence = ui.column().classes("w-full gap-3").props("data-part=evidence")
            with self._panel("playground"):
                self.play.build()
        for column in (self.zoo, self.evidence):
            with column:
                ui.spinner()

    def _panel(self, name: str) -> Any:
        return ui.tab_panel(name).classes("flex flex-col flex-nowrap gap-4 p-4")

    def refresh(self) -> None:
        """Show what is new where that takes no time."""
        self.graph.refresh()
        self.recipe.refresh()
        self.play.refresh()
        self._show_plan()

    async def draw(self) -> None:
        """Show what is new in tables and figures."""
        if self._drawn != self.work.version:
            self._drawn = self.work.version
            await self._show_zoo()
            await self._show_evidence()

    def _show_plan(self) -> None:
        work, standing = self.work, self.work.standing
        self.plan.clear()
        with self.plan:
            if standing.waits_for == "plan" and work.run is not None and not work.busy:
                ui.label(plan_of(work.run, work)).classes(
                    f"{PRE} w-full bg-gray-50 border border-gray-300 rounded p-3"
                ).props("data-part=plan-text")
                answers(work, asked("plan", ()))
            elif standing.waits_for == "download" and not work.busy:
                ui.label(plain(standing.waiting or "")).classes(TEXT)
                answers(work, asked("download", ()))
            else:
                ui.label("No plan waits for a yes.").classes(NOTE)
                make = ui.button("Make the plan of this recipe", on_click=lambda: tried(self._make_plan))
                make.props("outline no-caps")
                make.set_enabled(not work.busy)

    def _make_plan(self) -> None:
        self.work.call(calls.RunDraft())

    async def _show_zoo(self) -> None:
        desk, work = self.work.conversation.context.desk, self.work
        if self._zoo is None:
            rows = await thread.io_bound(views.models, desk) or []
            with self.table:
                columns = [
                    {"name": key, "label": key, "field": key, "align": "right" if key in NUMBERS else "left"}
                    for key in views.COLUMNS
                ]
                ui.table(rows=rows, columns=columns, row_key="model").props("dense flat bordered").classes(
                    "w-full"
                ).props("data-part=models")
        figures = await thread.io_bound(views.zoo_figures, work.run, desk.compared)
        if (figures, work.busy) == self._zoo:
            return
        self._zoo = (figures, work.busy)
        self.zoo.clear()
        with self.zoo:
            if figures is None:
                ui.label(
                    "How alike the models are is known once they have been compared; a plan does that too."
                ).classes(NOTE)
                compare = ui.button("Compare them", on_click=lambda: tried(self._compare)).props("outline no-caps")
                compare.set_enabled(not work.busy)
                return
            ui.label(f"Which belong together, {figures.about}").classes("font-medium")
            small_table(("cluster", "models", "why"), figures.groups)
            figure(figures.dendrogram, "Dendrogram: groups join where lines meet; red is the threshold")
            figure(figures.heatmap, "Similarity of all pairs; × where two models cannot be compared")

    def _compare(self) -> None:
        self.work.call(calls.CompareModels())

    async def _show_evidence(self) -> None:
        work = self.work
        last = work.standing.finished[-1:]
        run = work.run
        found = await thread.io_bound(views.findings, run)
        if (found is None or not found.verdict) and last and not work.running:
            found = await thread.io_bound(views.findings, Run(work.conversation.root / last[0]))
        if found == self._found:
            return
        self._found = found
        self.evidence.clear()
        with self.evidence:
            if found is None:
                ui.label("What a composite gained is shown here once one has been made and evaluated.").classes(NOTE)
                return
            show_findings(found)


def show_findings(found: views.Findings) -> None:
    """Draw what a run found."""
    with ui.row().classes("w-full items-baseline gap-3"):
        ui.label(f"Run {plain(found.run)}").classes("font-medium")
        if found.report:
            ui.link("whole report", f"/report/{found.run}", new_tab=True)
    if found.verdict:
        ui.label(plain(found.verdict)).classes(f"{TEXT} border-l-4 border-cyan-700 pl-3")
        ui.html(found.table).classes("report").props("data-part=evidence-table")
        figure(found.plot, "Mean scores on held-out items, and composite minus each with its 95 % interval")
    if found.experts:
        ui.label("Experts").classes("font-medium")
        small_table(("expert", "made of", "why"), found.experts)
        for name, reason in found.left_out.items():
            ui.label(f"{plain(name)} was left out: {plain(reason)}").classes(NOTE)
    ui.label("Merge tree").classes("font-medium")
    ui.html(found.trees).classes("report").props("data-part=merge-tree")


def plan_of(run: Run, work: Work) -> str:
    """Return the plan that waits, as the chat says it."""
    sound = run.path / "zoo-sound.json"
    zoo = Zoo.load(sound if sound.is_file() else run.path / "zoo.json")
    return plain(plan_in_words(Plan.load(run.path / "plan.json"), zoo, run, work.standing.draft))
