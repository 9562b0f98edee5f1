"""The playground: talks to the composite that is served."""

from nicegui import ui

from composer.chat import calls
from composer.errors import ComposerError
from composer.runs import Run
from composer.ui import asking
from composer.ui.look import NOTE, TEXT, tried
from composer.ui.views import plain
from composer.ui.work import Work


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
                    .props(f"autogrow outlined dense maxlength={asking.LONGEST_PROMPT}")
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
            chat = asking.takes_chats(composite)
            async for piece in asking.ask(endpoint, str(self.model.value), prompt, chat=chat):
                if piece.expert:
                    instead = f", instead of {piece.instead_of}" if piece.instead_of else ""
                    expert.text = plain(f"{piece.expert} answers{instead}")
                answer.text += plain(piece.text)
        except ComposerError as error:
            expert.text = ""
            answer.text = plain(str(error))
            answer.classes("text-red-800")
