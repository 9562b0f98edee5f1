"""The layout: chat on one side, on the other what it is about. One `Page` for each browser; they share the `Work`."""

from nicegui import ui

from composer.report import parts_style
from composer.ui.chat import Chat, in_short
from composer.ui.side import Side
from composer.ui.views import plain
from composer.ui.work import Work

TICK = 0.25
"""Seconds between two looks at what is new."""
STYLE = """
.report { --ink: #1f2933; --soft: #52606d; --line: #d9e2ec; --accent: #0b7285; font-size: 13px; width: 100%%; %s
  table { font-size: 12px; line-height: 1.35; } th, td { padding: .25rem .3rem; }
  td:first-child { white-space: normal; } .se { font-size: 11px; } }
"""


class Page:
    """What one browser shows."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.desk = work.conversation.context.desk
        self.chat, self.side = Chat(work), Side(work)
        self._version: object = None
        self._mood = ""

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
