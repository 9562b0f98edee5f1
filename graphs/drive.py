"""Driving the compose graph: as far as it goes, with progress, from wherever it stopped."""

from typing import TYPE_CHECKING, Any

from composer.progress import Progress, Step
from composer.runs import Run

if TYPE_CHECKING:
    from graphs.state import ComposeContext


def advance(run: Run, context: "ComposeContext", progress: Progress, *, yes: bool = False) -> dict[str, Any] | None:
    """Run the graph of a run as far as it goes; return the interrupt it waits at, or None at its end.

    Args:
        run: The run; its directory holds LangGraph's checkpoints.
        context: What its nodes are told.
        progress: Told of every step.
        yes: The answer to the plan, if that is what it waits for.
    """
    from langgraph.checkpoint.sqlite import SqliteSaver
    from langgraph.types import Command

    from graphs.compose import build

    config: Any = {"configurable": {"thread_id": run.name}}
    with SqliteSaver.from_conn_string(str(run.checkpoints)) as saver:
        graph = build().compile(checkpointer=saver)
        state = graph.get_state(config)
        if state.values and not state.next:
            return None  # only the endpoint is wanted
        start: Any = None if state.next else {}
        if yes and state.interrupts:
            start = Command(resume=True)
        for step in graph.stream(start, config, context=context, stream_mode="custom", durability="sync"):
            progress(Step.model_validate(step))
        interrupts = graph.get_state(config).interrupts
        return dict(interrupts[0].value) if interrupts else None


def begin_again_if_gone(run: Run) -> str | None:
    """Begin a run again whose composite is there no more, or not as it was, so that what it needs is made anew.

    Returns:
        What is gone, in words; None if all is as it should be.
    """
    if not run.composite.is_symlink():
        return None
    from composer.errors import ServeError
    from composer.mixture import Composite

    try:
        Composite.open(run.composite.resolve()).verify(run.store)
    except ServeError as error:
        with run.locked():
            run.begin_again()
        return str(error).removesuffix("; run the recipe again")
    return None
