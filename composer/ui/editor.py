"""The draft as YAML, to change by hand."""

from nicegui import run as thread
from nicegui import ui

from composer.chat import calls
from composer.chat.answers import draft_in_words
from composer.chat.rewrite import rewritten
from composer.errors import ComposerError
from composer.ui import views
from composer.ui.look import TEXT, tried
from composer.ui.views import plain
from composer.ui.work import Work


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
