"""What all parts of the page share: how text looks, small tables, figures, refusals."""

from collections.abc import Callable, Iterable

from nicegui import ui

from composer.errors import ComposerError
from composer.ui.views import plain
from composer.ui.work import Work

TEXT = "whitespace-pre-wrap [overflow-wrap:anywhere]"
PRE = f"{TEXT} font-mono text-xs leading-5"
NOTE = f"{TEXT} text-sm text-gray-600"


def tried(action: Callable[[], None]) -> bool:
    """Do something; tell the person if it is refused."""
    try:
        action()
    except ComposerError as error:
        ui.notify(str(error), type="warning", multi_line=True)
        return False
    return True


def asked(waits_for: str | None, options: Iterable[str]) -> dict[str, str]:
    """Return what may be answered, by what the buttons say."""
    if waits_for == "answer":
        return {plain(one): one for one in options}
    return {"Download" if waits_for == "download" else "Approve": "yes", "Reject": "no"}


def answers(work: Work, replies: dict[str, str], *, first: bool = True) -> None:
    """Draw a button for each reply; the first one stands out, unless none is nearer than the others."""
    with ui.row().classes("gap-2 pb-2"):
        for place, (label, said) in enumerate(replies.items()):
            button = ui.button(label, on_click=lambda said=said: tried(lambda: work.say(said)))
            button.props("no-caps dense padding='xs md'" + ("" if first and place == 0 else " outline"))


def small_table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """Draw a table whose cells are text and may break."""
    columns = [
        {"name": head, "label": head, "field": head, "align": "left", "style": f"white-space: {wrap}"}
        for head, wrap in zip(heads, ("nowrap", *["normal"] * (len(heads) - 1)), strict=True)
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
