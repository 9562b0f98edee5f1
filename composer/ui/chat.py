"""The chat's side of the page."""

from nicegui import ui

from composer.chat.words import LONGEST
from composer.ui.look import PRE, TEXT, answers, asked, tried
from composer.ui.views import plain
from composer.ui.work import Work

SHOWN = 200
"""Messages that are shown of a long conversation, at most."""
STARTERS = ("list", "merge everything and serve it", "what would it cost with all of them?", "help")
"""What a newcomer may begin with."""


class Chat:
    """What is said, and where to say it."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self._shown: list[str] = []

    def build(self) -> None:
        """Lay it out."""
        backwards = "flex flex-col-reverse flex-nowrap"  # so that it begins at its end, and stays there
        with (
            ui.element("div").classes(f"grow min-h-0 overflow-y-auto {backwards}"),
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
        look = "ml-8 self-end bg-primary text-white" if own else "mr-4 self-start border"
        look += "" if own else " border-amber-600 bg-amber-50" if wrong else " border-gray-300 bg-white"
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
            answers(work, {text: text for text in STARTERS}, first=False)

    def _greet(self) -> None:
        shelf = self.work.conversation.context.desk.shelf
        ui.label(
            f"{len(shelf.models)} models from {plain(str(shelf.path))}. What shall they become? Nothing is made before "
            "you have seen the plan and said yes."
        ).classes(f"{TEXT} text-sm text-gray-700")


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
