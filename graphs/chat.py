"""The chat graph: from what a person says to a composite, and to answers about it.

    understand -> clarify (asks, waits) -> understand
               -> act -> fetch (waits) -> plan -> approve (waits) -> compose -> report

Three nodes wait for a person, and stand alone, since an interrupted node runs again from its top. What is said while
one of them waits may be an answer or another request. Torch and the compose graph are imported where they are needed
first: an answer in words takes less than a second.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

from langgraph.config import get_stream_writer
from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime
from langgraph.types import Command, interrupt

from composer.chat import answers, calls
from composer.chat.calls import CALL, Question, Understood
from composer.chat.desk import Desk, composed, is_no, is_yes
from composer.chat.draft import Draft, begun, changed
from composer.chat.driver import Driver, make_driver
from composer.chat.rewrite import rewritten
from composer.chat.saving import as_yaml, save
from composer.errors import CancelledError, ComposerError, RecipeError
from composer.progress import Progress, Step
from composer.runs import Run, runs_root

if TYPE_CHECKING:
    from composer.planning import Plan
    from composer.serving.server import Endpoint
    from composer.zoo.checkpoint import Zoo


class ChatState(TypedDict, total=False):
    """What a conversation remembers: words, the draft, and where its runs are."""

    said: str
    """The last message."""
    messages: Annotated[list[dict[str, str]], add]
    """All that was said: role ("you" or "composer") and text."""
    draft: dict[str, Any] | None
    """The recipe in the making (`Draft`)."""
    earlier: list[dict[str, Any]]
    """Drafts before it, the last one last."""
    calls: list[dict[str, Any]]
    """What is to be done (`Call`s)."""
    question: dict[str, Any] | None
    """What was asked back (`Question`)."""
    supposed: dict[str, Any] | None
    """A draft that is only to be priced."""
    run: str | None
    """The run directory of the plan that waits, or was carried out last."""
    finished: list[str]
    """Runs that this conversation finished, the last one last."""


@dataclass(frozen=True)
class ChatContext:
    """What a caller of the graph says besides the message; plain values, so that any server can show and set it."""

    root: str = ""
    """Where runs live; by default as for every command."""
    zoo: str = ""
    """A recipe or a folder of checkpoints; by default the quickstart recipe."""
    home: str = ""
    """Where recipes are saved; by default the working directory."""
    yes: bool = False
    """Approve plans without asking; for scripts."""
    front: str = ""
    """Base address of the front that composites are served behind, if there is one."""

    @property
    def desk(self) -> Desk:
        """What the tools work with."""
        return _desk(self.root or str(runs_root()), self.zoo)

    @property
    def driver(self) -> Driver:
        """What understands messages."""
        return make_driver()


@cache
def _desk(root: str, zoo: str) -> Desk:
    return Desk(Path(root), Path(zoo) if zoo else None)


def say(text: str, error: ComposerError | None = None) -> dict[str, str]:
    """Stream an answer, with the exit code of the error that it is about, and return it as a message to remember."""
    get_stream_writer()({"say": text, "code": error.exit_code if error else 0})
    return {"role": "composer", "text": text}


def _progress() -> Progress:
    write: Callable[[Any], None] = get_stream_writer()

    def progress(step: Step) -> None:
        write({"step": step.model_dump()})

    return progress


def _draft(state: ChatState, desk: Desk) -> Draft:
    kept = state.get("draft")
    return Draft.model_validate(kept) if kept else begun(desk.shelf)


def begin(state: ChatState) -> Literal["understand", "act"]:
    """Send words to the driver, and calls of a program straight to the tools."""
    return "act" if state.get("calls") and not state.get("said") else "understand"


def understand(state: ChatState, runtime: Runtime[ChatContext]) -> Command[Literal["clarify", "act", "__end__"]]:
    """Ask the driver what is wanted."""
    desk, said = runtime.context.desk, state.get("said", "")
    asked = state.get("question")
    question = Question.model_validate(asked) if asked else None
    heard = [{"role": "you", "text": said}]
    try:
        understood = runtime.context.driver.understand(said, _draft(state, desk), desk.shelf, question)
    except ComposerError as error:
        understood = Understood(refusal=str(error))
    told = [say(note) for note in understood.notes]
    told += [say(understood.text)] if understood.text else []
    told += [say(understood.refusal, RecipeError())] if understood.refusal else []
    update: dict[str, Any] = {"question": None, "calls": [], "messages": heard + told, "supposed": None}
    if understood.question is not None:
        update["question"] = understood.question.model_dump(mode="json")
        update["messages"] = [*heard, *told, say(understood.question.text)]
        return Command(goto="clarify", update=update)
    if understood.refusal or not understood.calls:
        return Command(goto="__end__", update=update)
    update["calls"] = [call.model_dump(mode="json") for call in understood.calls]
    return Command(goto="act", update=update)


def clarify(state: ChatState) -> Command[Literal["understand"]]:
    """Wait for an answer."""
    answer = interrupt({"ask": (state.get("question") or {}).get("text", "")})
    return Command(goto="understand", update={"said": str(answer)})


class _Turn:
    """Carries out the calls of one message."""

    def __init__(self, state: ChatState, context: ChatContext) -> None:
        self.state, self.context, self.desk = state, context, context.desk
        self.draft = _draft(state, self.desk)
        self.earlier = list(state.get("earlier") or [])
        self.finished = list(state.get("finished") or [])
        self.run = state.get("run")
        self.supposed: Draft | None = None
        self.planning = False
        self.told: list[dict[str, str]] = []

    def say(self, text: str) -> None:
        """Answer."""
        self.told.append(say(text))

    def do(self, call: Any) -> None:
        """Carry out one call.

        Raises:
            ComposerError: as the room that does it.
        """
        getattr(self, f"_{call.tool}")(call)

    def _list_models(self, call: calls.ListModels) -> None:
        self.say(answers.shelf_in_words(self.desk.shelf, self.draft))

    def _inspect_model(self, call: calls.InspectModel) -> None:
        for name in call.models:
            self.desk.shelf.check(name)
            self.say(answers.model_in_words(self.desk.shelf, name))

    def _compare_models(self, call: calls.CompareModels) -> None:
        self.say(self.desk.compare(self.draft, call.models, _progress()))

    def _draft(self, call: calls.DraftRecipe) -> None:
        new = changed(self.draft, call.edit, self.desk.shelf, self.state.get("said", ""))
        self.earlier.append(self.draft.model_dump(mode="json"))
        self.draft, self.planning = new, True
        self.say(answers.draft_in_words(new))

    def _plan(self, call: calls.PlanDraft) -> None:
        if call.edit.empty:
            self.planning = True
        else:
            self.supposed = changed(self.draft, call.edit, self.desk.shelf)
            self.say(f"Supposing: {answers.draft_in_words(self.supposed)} (the draft stays as it is)")

    def _run(self, call: calls.RunDraft) -> None:
        self.planning = True

    def _rewrite(self, call: calls.RewriteDraft) -> None:
        new = rewritten(self.draft, call.text, self.desk.shelf)
        self.earlier.append(self.draft.model_dump(mode="json"))
        self.draft, self.planning = new, True
        self.say(answers.draft_in_words(new))

    def _show_draft(self, call: calls.ShowDraft) -> None:
        self.say(as_yaml(self.draft) if self.draft.tasks else answers.draft_in_words(self.draft))

    def _status(self, call: calls.Status) -> None:
        self.say(self.desk.status(serving_in_words(), self.finished))

    def _cancel(self, call: calls.Cancel) -> None:
        self.say("stopping" if cancel() else "nothing is running in this conversation")

    def _serve(self, call: calls.Serve) -> None:
        run = composed(self.finished[-1] if self.finished else self.run)
        self.draft = self.draft.model_copy(update={"serve": True})
        self.say(_serving(run, self.context.front, _progress()))

    def _stop(self, call: calls.Stop) -> None:
        stopped = stop_serving()
        self.draft = self.draft.model_copy(update={"serve": False})
        self.say(f"stopped {stopped}" if stopped else "nothing is served")

    def _route(self, call: calls.Route) -> None:
        self.say(self.desk.route(composed(self.finished[-1] if self.finished else self.run), call.prompt))

    def _explain(self, call: calls.Explain) -> None:
        self.say(self.desk.explain(composed(self.finished[-1] if self.finished else self.run), call.model))

    def _evidence(self, call: calls.ShowEvidence) -> None:
        run = composed(self.finished[-1] if self.finished else self.run)
        if not (run.path / "evidence.json").is_file():
            raise RecipeError(f"{run.name} has not been evaluated yet; 'run' carries on")
        self.say(self.desk.evidence(run))

    def _save(self, call: calls.Save) -> None:
        path = save(self.draft, call.file, Path(self.context.home or Path.cwd()))
        self.say(f"saved: model-composer run {path}")

    def _undo(self, call: calls.Undo) -> None:
        if not self.earlier:
            raise RecipeError("there is nothing to undo")
        self.draft = Draft.model_validate(self.earlier.pop())
        self.say(f"Back to: {answers.draft_in_words(self.draft)}")

    def _roll_back(self, call: calls.RollBack) -> None:
        if len(self.finished) < 2:
            raise RecipeError("there is no composite before the last one in this conversation")
        was_served = served() is not None
        stop_serving()
        self.finished.pop()
        run = composed(self.finished[-1])
        self.run = str(run.path)
        self.earlier.append(self.draft.model_dump(mode="json"))
        document = run.recipe.model_dump(mode="json", exclude_defaults=True)
        self.draft = Draft(document=document, serve=was_served, said=(f"rolled back to {run.name}",))
        self.say(f"Back to {run.name}: {answers.draft_in_words(self.draft)}")
        if was_served:
            self.say(_serving(run, self.context.front, _progress()))

    def _help(self, call: calls.Help) -> None:
        self.say(answers.HELP)


def act(state: ChatState, runtime: Runtime[ChatContext]) -> Command[Literal["clarify", "fetch", "price", "__end__"]]:
    """Carry out the calls; what makes something goes on to its plan."""
    turn = _Turn(state, runtime.context)
    goto: Any = END
    question: Question | None = None
    try:
        for call in state.get("calls") or []:
            turn.do(CALL.validate_python(call))
        if turn.planning and not turn.draft.tasks:
            question = Question(
                text="which tasks are to judge it? lm-eval's names, e.g. 'evaluate on arc_easy and piqa'",
                join="evaluate on {answer}",
            )
            turn.say(question.text)
        goto = "clarify" if question else "price" if turn.supposed else "fetch" if turn.planning else END
    except ComposerError as error:
        turn.told.append(say(str(error), error))
    update = {
        "draft": turn.draft.model_dump(mode="json"),
        "earlier": turn.earlier,
        "finished": turn.finished,
        "run": turn.run,
        "supposed": turn.supposed.model_dump(mode="json") if turn.supposed else None,
        "question": question.model_dump(mode="json") if question else None,
        "calls": [],
        "messages": turn.told,
    }
    return Command(goto=goto, update=update)


def price(state: ChatState, runtime: Runtime[ChatContext]) -> dict[str, Any]:
    """Say what something would cost that nobody has asked for yet."""
    from composer.preview import preview
    from composer.zoo import missing_downloads

    supposed, desk = Draft.model_validate(state.get("supposed")), runtime.context.desk
    try:
        recipe = supposed.recipe
        missing = missing_downloads(recipe.zoo)
        if missing:
            return {
                "messages": [say(f"{_sizes(missing)} would have to be downloaded first; the rest is known after that")]
            }
        plan, zoo = preview(recipe, desk.store, _progress())
        told = say(answers.plan_in_words(plan, zoo, None, supposed, runtime.context.front))
    except ComposerError as error:
        told = say(str(error), error)
    return {"messages": [told], "supposed": None}


def fetch(state: ChatState, runtime: Runtime[ChatContext]) -> Command[Literal["understand", "plan", "__end__"]]:
    """Wait for a yes to downloads, if any are needed to make the plan."""
    from composer.zoo import missing_downloads

    try:
        missing = missing_downloads(_draft(state, runtime.context.desk).recipe.zoo)
    except ComposerError as error:
        return Command(goto="__end__", update={"messages": [say(str(error), error)]})
    if not missing or runtime.context.yes:
        return Command(goto="plan")
    answer = str(
        interrupt({"ask": f"A plan needs {_sizes(missing)} from the hub first. Download?", "downloads": missing})
    )
    return _answered(answer, "plan", "Nothing was downloaded.")


def _sizes(missing: dict[str, int]) -> str:
    from rich.filesize import decimal

    return ", ".join(f"{repository} ({decimal(size)})" for repository, size in missing.items())


def _answered(answer: str, agreed: str, refused: str) -> Command[Any]:
    if is_yes(answer):
        return Command(goto=agreed, update={"messages": [{"role": "you", "text": answer}]})
    if is_no(answer):
        return Command(goto="__end__", update={"messages": [{"role": "you", "text": answer}, say(refused)]})
    return Command(goto="understand", update={"said": answer})


def plan(state: ChatState, runtime: Runtime[ChatContext]) -> Command[Literal["approve", "report", "__end__"]]:
    """Run the compose graph up to its plan, and show that."""
    desk = runtime.context.desk
    draft = _draft(state, desk)
    try:
        recipe = draft.recipe
        run = Run.of(recipe, desk.root)
        if run.finished:
            told = say(f"This has been composed before, as {run.name}.")
            return Command(goto="report", update={"run": str(run.path), "messages": [told]})
        made, zoo = _planned(run, draft, runtime.context, _progress())
        broken = draft.limits.broken_by(made)
        shown = say(answers.plan_in_words(made, zoo, run, draft, runtime.context.front))
        update = {"run": str(run.path), "messages": [shown]}
        if broken:
            hint = f"{broken}; try fewer items or models, another strategy, or lift the limit"
            return Command(goto="__end__", update={**update, "messages": [shown, say(hint)]})
        return Command(goto="approve", update=update)
    except ComposerError as error:
        return Command(goto="__end__", update={"messages": [say(str(error), error)]})


def _planned(run: Run, draft: Draft, chat: ChatContext, progress: Progress) -> "tuple[Plan, Zoo]":
    """Return the plan of a run, made now unless an earlier attempt got that far."""
    from composer.planning import Plan
    from composer.zoo.checkpoint import Zoo

    if not (run.path / "plan.json").is_file():
        from graphs.drive import advance
        from graphs.state import ComposeContext

        with chat.desk.working(f"the plan of {run.name}", run), run.locked():
            run.create(draft.recipe)
            context = ComposeContext(run_path=str(run.path), front=chat.front)
            context.session.stopping.clear()
            advance(run, context, progress)
    sound = run.path / "zoo-sound.json"
    return Plan.load(run.path / "plan.json"), Zoo.load(sound if sound.is_file() else run.path / "zoo.json")


def approve(state: ChatState, runtime: Runtime[ChatContext]) -> Command[Literal["understand", "compose", "__end__"]]:
    """Wait for a yes to the plan; another request changes the draft instead."""
    if runtime.context.yes:
        return Command(goto="compose")
    answer = str(interrupt({"ask": "Go ahead?", "run": state.get("run")}))
    return _answered(answer, "compose", "Nothing was made.")


def compose(state: ChatState, runtime: Runtime[ChatContext]) -> Command[Literal["report", "__end__"]]:
    """Carry out the plan: the compose graph, from where it stopped, to its end."""
    from graphs.drive import advance
    from graphs.state import ComposeContext

    desk, run = runtime.context.desk, Run(Path(str(state.get("run"))))
    draft = _draft(state, desk)
    context = ComposeContext(run_path=str(run.path), keep_serving=draft.serve, front=runtime.context.front)
    told = []
    try:
        with desk.working(run.name, run), run.locked():
            stopped = stop_serving()  # one composite at a time: they share memory and ports
            told = [say(f"stopped {stopped} to make room")] if stopped else []
            context.session.stopping.clear()
            try:
                advance(run, context, _progress(), yes=True)
            except BaseException:
                context.session.close()
                raise
    except ComposerError as error:
        stopped_at = str(error) if isinstance(error, CancelledError) else f"{error}. Say 'run' to carry on"
        return Command(goto="__end__", update={"messages": [*told, say(stopped_at, error)]})
    return Command(goto="report", update={"messages": told})


def report(state: ChatState, runtime: Runtime[ChatContext]) -> dict[str, Any]:
    """Say what was found, and bring the endpoint up if it is wanted."""
    from composer.evaluation.evidence import Evidence
    from composer.mixture.composite import Composite

    run = Run(Path(str(state.get("run"))))
    draft = _draft(state, runtime.context.desk)
    finished = [one for one in state.get("finished") or [] if one != str(run.path)]
    evidence, composite = Evidence.load(run.path / "evidence.json"), Composite.open(run.composite.resolve())
    told = [say(answers.result_in_words(run, evidence, composite, draft.recipe.merge.protect))]
    if draft.serve:
        try:
            told.append(say(_serving(run, runtime.context.front, _progress())))
        except ComposerError as error:
            told.append(say(str(error), error))
    return {"finished": [*finished, str(run.path)], "messages": told}


def _serving(run: Run, front: str, progress: Progress) -> str:
    from graphs.state import ComposeContext, close

    close(but=str(run.path))
    session = ComposeContext(run_path=str(run.path), front=front).session
    session.stopping.clear()
    endpoint = session.serving(str(run.composite.resolve()), progress).endpoint
    return f"{endpoint.model} answers at {endpoint.address}/v1 until you say stop or leave"


def _loaded() -> Any:
    """Return `graphs.state` if anything has been run in this process; importing it takes torch."""
    import sys

    return sys.modules.get("graphs.state")


def served() -> "Endpoint | None":
    """Return where this process serves a composite, or None."""
    state = _loaded()
    server = state.serving() if state else None
    return server.endpoint if server else None


def stop_serving() -> str | None:
    """Stop what this process serves; return what and where it was, or None."""
    was = serving_in_words()
    if was is not None:
        _loaded().close()
    return was


def serving_in_words() -> str | None:
    """Return name and address of what this process serves, or None."""
    endpoint = served()
    return f"{endpoint.model} at {endpoint.address}/v1" if endpoint else None


def cancel() -> bool:
    """Tell what runs in this process to stop; return whether anything may."""
    state = _loaded()
    return bool(state and state.stop())


def build() -> "StateGraph[ChatState, ChatContext]":
    """Return the graph, not yet compiled."""
    os.environ.setdefault("LANGGRAPH_STRICT_MSGPACK", "true")
    graph = StateGraph(ChatState, context_schema=ChatContext)
    graph.add_node("understand", understand)
    graph.add_node("clarify", clarify)
    graph.add_node("act", act)
    graph.add_node("price", price)
    graph.add_node("fetch", fetch)
    graph.add_node("plan", plan)
    graph.add_node("approve", approve)
    graph.add_node("compose", compose)
    graph.add_node("report", report)
    graph.add_conditional_edges(START, begin)
    graph.add_edge("price", END)
    graph.add_edge("report", END)
    return graph


graph = build().compile(name="chat")
"""Without a checkpointer: servers such as LangGraph's bring their own."""
