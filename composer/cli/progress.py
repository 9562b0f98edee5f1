"""Progress on the terminal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from composer.progress import Progress as Callback
from composer.progress import Step


@contextmanager
def progress_bar(*, quiet: bool = False) -> Iterator[Callback]:
    """Yield a callback that draws one bar per stage on standard error.

    On a terminal the bars move; elsewhere each stage gets one line when it starts, so that logs stay readable.
    """
    console = Console(stderr=True, highlight=False)
    if quiet or not sys.stderr.isatty():
        last: list[str] = []

        def plain(step: Step) -> None:
            if not quiet and last[-1:] != [step.stage]:
                last.append(step.stage)
                console.print(f"{step.stage} …")

        yield plain
        return
    columns = (
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description:<9}"),
        BarColumn(bar_width=28),
        TimeElapsedColumn(),
        TextColumn("{task.fields[message]}"),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, int] = {}

        def draw(step: Step) -> None:
            if step.stage not in tasks:
                tasks[step.stage] = bars.add_task(step.stage, total=None, message="")
            identifier = tasks[step.stage]
            if step.message == "finished":
                bars.update(identifier, total=1, completed=1, message="")  # type: ignore[arg-type]
                return
            message = step.message if len(step.message) <= 60 else step.message[:57] + "…"
            bars.update(identifier, total=step.total, completed=step.done, message=message)  # type: ignore[arg-type]

        yield draw
