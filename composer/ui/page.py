"""The layout: chat on one side, on the other what it is about. One `Page` for each browser; they share the `Work`."""

import time
from collections.abc import Callable, Iterable
from typing import Any

from nicegui import run as thread
from nicegui import ui

from composer.chat import calls
from composer.chat.answers import draft_in_words, plan_in_words
from composer.chat.rewrite import rewritten
from composer.chat.words import LONGEST
from composer.errors import ComposerError
from composer.planning import Plan
from composer.report import parts_style
from composer.runs import Run
from composer.ui import playground, views
from composer.ui.stages import Stage, stages_of
from composer.ui.views import plain
from composer.ui.work import Work
from composer.zoo.checkpoint import Zoo

TICK = 0.25
"""Seconds between two looks at what is new."""
SHOWN = 200
"""Messages that are shown of a long conversation, at most."""
STARTERS = ("list", "merge everything and serve it", "what would it cost with all of them?", "help")
"""What a newcomer may begin with."""
TABS = {"run": "account_tree", "plan": "fact_check", "zoo": "hub", "evidence": "query_stats", "playground": "forum"}
ICONS = {
    "ahead": ("radio_button_unchecked", "text-gray-400"),
    "going": ("autorenew", "text-primary animate-spin"),
    "waiting": ("pan_tool", "text-amber-700"),
    "done": ("check_circle", "text-primary"),
    "stopped": ("pause_circle", "text-red-700"),
}
TEXT = "whitespace-pre-wrap [overflow-wrap:anywhere]"
PRE = f"{TEXT} font-mono text-xs leading-5"
NOTE = f"{TEXT} text-sm text-gray-600"
STYLE = """
.report { --ink: #1f2933; --soft: #52606d; --line: #d9e2ec; --accent: #0b7285; font-size: 14px; width: 100%%; %s }
"""


class Page:
    """What one browser shows."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.desk = work.conversation.context.desk
        self.chat, self.side = Chat(work), Side(work)
        self._version, self._mood = -1, ""

    def build(self) -> None:
        """Lay the page out."""
        ui.colors(primary="#0b7285")
        ui.add_css(STYLE % parts_style())
        ui.query(".nicegui-content").classes("p-0 gap-0")
        with ui.header().classes("items-center gap-3 px-4 py-2 no-wrap"):
            ui.label("Model Composer").classes("font-semibold whitespace-nowrap")
            ui.label(plain(self.work.conversation.name)).classes("opacity-80 truncate")
            ui.space()
            self.state = ui.label().classes("text-sm truncate").props("data-part=state")
        with ui.element("div").classes("flex flex-col lg:flex-row flex-nowrap w-full lg:h-[calc(100vh-2.75rem)]"):
            with ui.element("section").classes(
                "flex flex-col flex-nowrap w-full lg:w-2/5 h-[72vh] lg:h-full min-w-0 "
                "bg-gray-50 border-r border-b border-gray-300"
            ):
                self.chat.build()
            with ui.element("section").classes("flex flex-col flex-nowrap w-full lg:w-3/5 lg:h-full min-w-0"):
                self.side.build()
        ui.timer(TICK, self.tick)
        ui.timer(4 * TICK, self.side.draw)  # figures take a second, and progress does not wait for them

    def tick(self) -> None:
        """Show what is new."""
        self.work.look()
        version, running = self.work.version, self.work.running
        if version != self._version:
            self._version = version
            self.state.text = in_short(self.work)
            self.chat.refresh()
            self._turn_to_what_matters()
            self.side.refresh()
        elif running:
            self.side.graph.refresh()

    def _turn_to_what_matters(self) -> None:
        """Show the tab that the conversation has come to, once: people may look at another."""
        standing = self.work.standing
        mood = "run" if self.work.running else "plan" if standing.waits_for in ("plan", "download") else ""
        mood = mood or ("evidence" if standing.finished else "zoo")
        if mood != self._mood:
            self._mood = mood
            self.side.tabs.value = mood


def in_short(work: Work) -> str:
    """Return in a few words what is going on."""
    if work.busy and work.step is not None:
        return f"{work.step.stage}: {plain(work.step.message)}"
    if work.busy:
        return "thinking …"
    if work.elsewhere:
        return f"{plain(work.elsewhere)} is going on elsewhere"
    if work.standing.waits_for:
        return "waits for you"
    serving = work.endpoint
    return f"serving at {serving.url}/v1" if serving else "ready"


def tried(action: Callable[[], None]) -> bool:
    """Do something; tell the person if it is refused."""
    try:
        action()
    except ComposerError as error:
        ui.notify(str(error), type="warning", multi_line=True)
        return False
    return True


class Chat:
    """What is said, and where to say it."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self._shown: list[str] = []

    def build(self) -> None:
        """Lay it out."""
        with (
            ui.element("div").classes(
                "grow min-h-0 overflow-y-auto flex flex-col-reverse flex-nowrap"
            ),  # begins at its end
            ui.column().classes("w-full gap-2 p-4 mb-auto"),
        ):
            self._greet()
            self.messages = ui.column().classes("w-full gap-2").props("data-part=messages")
        self.below = ui.column().classes("w-full gap-2 px-4")
        with ui.row().classes("w-full items-end gap-2 p-3 no-wrap border-t border-gray-300 bg-white"):
            self.box = (
                ui.textarea(placeholder="Say what you want, e.g. merge math and law and serve it")
                .props(f"autogrow outlined dense maxlength={LONGEST + 1} input-style='max-height: 8rem'")
                .classes("grow min-w-0")
                .on("keydown.enter.exact.prevent", self.send)
            )
            ui.button(icon="send", on_click=self.send).props('round aria-label="Send"')

    def send(self) -> None:
        """Say what is in the box."""
        said = (self.box.value or "").strip()
        if said and tried(lambda: self.work.say(said)):
            self.box.value = ""

    def refresh(self) -> None:
        """Show what has been said since."""
        messages = self.work.messages[-SHOWN:]
        keys = [f"{one['role']}:{one['text']}" for one in messages]
        if keys[: len(self._shown)] != self._shown:
            self.messages.clear()
            self._shown = []
        with self.messages:
            for one in messages[len(self._shown) :]:
                self._bubble(one)
        self._shown = keys
        self.below.clear()
        with self.below:
            self._answer_or_progress(messages)

    def _bubble(self, message: dict[str, str]) -> None:
        text = plain(message["text"])
        own = message["role"] == "you"
        wrong = message.get("code", "0") != "0" or (not own and message["text"] in self.work.wrong)
        look = "ml-8 self-end bg-primary text-white" if own else "mr-4 self-start bg-white border border-gray-300"
        look = f"{look} border-amber-600 bg-amber-50" if wrong else look
        table = PRE if "\n " in text else f"{TEXT} text-sm"
        ui.label(text).classes(f"{table} {look} rounded-lg px-3 py-2 max-w-full").props("data-part=message")

    def _answer_or_progress(self, messages: list[dict[str, str]]) -> None:
        work, standing = self.work, self.work.standing
        if work.error:
            ui.label(plain(work.error)).classes(f"{TEXT} text-sm text-red-800")
        if work.busy:
            with ui.row().classes("w-full items-center gap-2 no-wrap"):
                ui.spinner(size="sm")
                ui.label(in_short(work)).classes("text-sm grow truncate")
                if work.running:
                    ui.button("Stop", icon="stop", on_click=work.stop).props("flat dense no-caps")
            return
        if standing.broken_off:
            ui.label("It was broken off in the middle; what is done is kept.").classes("text-sm")
            answers(work, {"Carry on": "run"})
        elif standing.waiting:
            if not messages or messages[-1]["text"] != standing.waiting:
                ui.label(plain(standing.waiting)).classes(f"{TEXT} text-sm font-medium")
            answers(work, asked(standing.waits_for, standing.options))
        elif not messages:
            answers(work, {text: text for text in STARTERS})

    def _greet(self) -> None:
        shelf = self.work.conversation.context.desk.shelf
        ui.label(
            f"{len(shelf.models)} models from {plain(str(shelf.path))}. What shall they become? Nothing is made before "
            "you have seen the plan and said yes."
        ).classes(f"{TEXT} text-sm text-gray-700")


def asked(waits_for: str | None, options: Iterable[str]) -> dict[str, str]:
    """Return what may be answered, by what the buttons say."""
    if waits_for == "answer":
        return {plain(one): one for one in options}
    return {"Download" if waits_for == "download" else "Approve": "yes", "Reject": "no"}


def answers(work: Work, replies: dict[str, str]) -> None:
    """Draw a button for each reply."""
    with ui.row().classes("gap-2 pb-2"):
        for place, (label, said) in enumerate(replies.items()):
            button = ui.button(label, on_click=lambda said=said: tried(lambda: work.say(said)))
            button.props("no-caps dense padding='xs md'" + ("" if place == 0 else " outline"))


class Side:
    """The tabs beside the chat."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.graph, self.play = Graph(work), Playground(work)
        self.recipe = RecipeEditor(work)
        self._drawn = -1
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
                with ui.column().classes("w-full gap-3").props("data-part=zoo") as self.zoo:
                    ui.spinner()
            with (
                self._panel("evidence"),
                ui.column().classes("w-full gap-3").props("data-part=evidence") as self.evidence,
            ):
                ui.spinner()
            with self._panel("playground"):
                self.play.build()

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


NUMBERS = ("parameters", "layers")


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


def small_table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """Draw a table whose cells are text and may break."""
    columns = [
        {"name": head, "label": head, "field": head, "align": "left", "style": "white-space: normal"} for head in heads
    ]
    filled = [dict(zip(heads, row, strict=True)) for row in rows]
    ui.table(rows=filled, columns=columns).props(
        "dense flat bordered hide-pagination :rows-per-page-options=[0]"
    ).classes("w-full")


def figure(address: str, caption: str) -> None:
    """Draw a picture that scrolls by itself where the page is narrow."""
    with ui.element("figure").classes("w-full overflow-x-auto"):
        ui.element("img").props["src"] = address
        ui.label(caption).classes(NOTE)


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

    def refresh(self) -> None:
        """Show how far the run is."""
        work = self.work
        run, step = work.run, work.step
        going = work.running
        stages = stages_of(run, going=going, now=time.time())
        self.title.text = f"Run {plain(run.name)}" if run else "No run yet: these are the stages that one goes through"
        self.now.text = self._in_words(stages, going)
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
        with ui.row().classes(f"items-center gap-2 no-wrap border rounded-lg px-2 py-1 bg-white {edge}"):
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


class RecipeEditor:
    """The draft as YAML, to change by hand."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self._given = ""

    def build(self) -> None:
        """Lay it out."""
        with ui.expansion("The recipe as YAML", icon="edit_note", value=True).classes(
            "w-full border border-gray-300 rounded"
        ):
            self.editor = ui.codemirror(language="YAML", line_wrapping=True).classes("w-full h-80 text-xs")
            self.editor.props("data-part=recipe")
            self.said = ui.label().classes(f"{TEXT} text-sm").props("data-part=recipe-said")
            with ui.row().classes("gap-2"):
                ui.button("Check", on_click=self.check).props("outline no-caps dense padding='xs md'")
                ui.button("Use it and plan", on_click=self.use).props("no-caps dense padding='xs md'")
                ui.button("Revert", on_click=self.revert).props("flat no-caps dense padding='xs md'")

    def refresh(self) -> None:
        """Show the draft, unless somebody is changing its text."""
        text = views.recipe_text(self.work.standing.draft)
        if text == self._given:
            return
        if self.editor.value in ("", self._given):
            self.editor.value, self.said.text = text, ""
            self._given = text
        else:
            self.said.text = "The draft has changed in the meantime; Revert shows it."

    def revert(self) -> None:
        """Show the draft as it is."""
        self._given = self.editor.value = views.recipe_text(self.work.standing.draft)
        self.said.text = ""

    async def check(self) -> bool:
        """Say what is wrong with the text."""
        desk, draft, text = self.work.conversation.context.desk, self.work.standing.draft, self.editor.value
        try:
            made = await thread.io_bound(rewritten, draft, text, desk.shelf)
        except ComposerError as error:
            self.said.text = plain(str(error))
            self.said.classes("text-red-800", remove="text-primary")
            return False
        self.said.text = f"Right: {plain(draft_in_words(made))}" if made else ""
        self.said.classes("text-primary", remove="text-red-800")
        return True

    async def use(self) -> None:
        """Make the text the draft, and plan it."""
        if await self.check() and tried(lambda: self.work.call(calls.RewriteDraft(text=self.editor.value))):
            self._given = self.editor.value
            self.said.text = ""


class Playground:
    """Talks to the composite that is served."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self._url: str | None = ""

    def build(self) -> None:
        """Lay it out."""
        self.head = ui.column().classes("w-full gap-2")
        with ui.column().classes("w-full gap-2") as self.body:
            self.model = ui.select([], label="who answers").props("dense outlined").classes("w-64 max-w-full")
            with ui.row().classes("w-full items-end gap-2 no-wrap"):
                self.prompt = (
                    ui.textarea(placeholder="Ask the composite")
                    .props(f"autogrow outlined dense maxlength={playground.LONGEST_PROMPT}")
                    .classes("grow min-w-0")
                    .on("keydown.enter.exact.prevent", self.ask)
                )
                ui.button("Ask", on_click=self.ask).props("no-caps")
        self.answers = ui.column().classes("w-full gap-3").props("data-part=answers")

    def refresh(self) -> None:
        """Show whether there is anything to talk to."""
        endpoint, work = self.work.endpoint, self.work
        state = f"{endpoint.url if endpoint else ''} {work.busy}"
        if state == self._url:
            return
        self._url = state
        self.body.visible = endpoint is not None
        self.head.clear()
        with self.head:
            if endpoint is not None:
                names = [endpoint.model, *endpoint.engines]
                self.model.set_options(
                    {name: "the router decides" if name == endpoint.model else name for name in names}
                )
                self.model.value = endpoint.model
                ui.label(f"{plain(endpoint.model)} at {endpoint.url}/v1").classes(NOTE)
                ui.button("Stop serving", on_click=lambda: self._call(calls.Stop())).props("flat no-caps dense")
            elif work.standing.finished:
                ui.label("The composite is not served now.").classes(NOTE)
                serve = ui.button("Serve it", on_click=lambda: self._call(calls.Serve())).props("no-caps")
                serve.set_enabled(not work.busy)
            else:
                ui.label("There is no composite yet to talk to.").classes(NOTE)

    def _call(self, tool: calls.Call) -> None:
        tried(lambda: self.work.call(tool))

    async def ask(self) -> None:
        """Ask what is in the box, and show the answer as it comes."""
        prompt, endpoint = (self.prompt.value or "").strip(), self.work.endpoint
        if not prompt or endpoint is None:
            return
        self.prompt.value = ""
        with self.answers, ui.column().classes("w-full gap-1 border border-gray-300 rounded-lg p-3") as card:
            ui.label(plain(prompt)).classes(f"{TEXT} text-sm text-gray-600")
            expert = ui.label("…").classes("text-xs font-medium text-primary").props("data-part=expert")
            answer = ui.label().classes(f"{TEXT} text-sm").props("data-part=answer")
        card.move(target_index=0)
        composite = Run(self.work.conversation.root / self.work.standing.finished[-1]).composite.resolve()
        try:
            chat = playground.takes_chats(composite)
            async for piece in playground.ask(endpoint, str(self.model.value), prompt, chat=chat):
                if piece.expert:
                    instead = f", instead of {piece.instead_of}" if piece.instead_of else ""
                    expert.text = plain(f"{piece.expert} answers{instead}")
                answer.text += plain(piece.text)
        except ComposerError as error:
            expert.text = ""
            answer.text = plain(str(error))
            answer.classes("text-red-800")
