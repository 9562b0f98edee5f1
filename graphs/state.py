"""What the compose graph remembers between nodes: paths and flags, never tensors or tables."""

from dataclasses import dataclass, field
from functools import partial
from operator import add
from pathlib import Path
from threading import Event, Lock
from typing import Annotated, TypedDict

from composer.evaluation.live import contexts
from composer.evaluation.scores import Scores
from composer.evaluation.tasks import Split, split_of
from composer.executors import Executor, make_executor
from composer.merging.judge import Judge
from composer.mixture import Known
from composer.mixture.examples import text_losses
from composer.probes import load_texts
from composer.progress import Progress
from composer.runs import Run
from composer.serving.server import Server
from composer.simmerge import Advisor
from composer.zoo import Checkpoint, Zoo


class ComposeState(TypedDict, total=False):
    """Files of finished stages, in the run directory."""

    zoo: str
    """The described models (`Zoo`)."""
    similarity: str
    """All pairs (`SimilarityMatrix`)."""
    clusters: str
    """All clusters (`Clusters`)."""
    plan: str
    """What was approved, or is to be (`Plan`)."""
    approved: bool
    """Whether a person, or --yes, agreed to the plan."""
    outcomes: Annotated[list[str], add]
    """One per cluster (`MergeOutcome`), in no order."""
    composite: str
    """The composite's directory."""
    endpoint: str
    """How it was served (`Endpoint`)."""
    evidence: str
    """What it gained (`Evidence`)."""
    report: str
    """The HTML report."""


class BranchState(TypedDict):
    """What one merge branch is told."""

    cluster: str
    plan: str
    zoo: str


@dataclass(frozen=True)
class ComposeContext:
    """What a caller of the graph says besides the state; plain values, so that any server can show and set it."""

    run_path: str
    """The run directory, made by `composer.runs.Run.create`."""
    yes: bool = False
    """Approve the plan without asking."""
    keep_serving: bool = False
    """Leave the endpoint up after the evaluation; whoever asked for it closes the session."""

    front: str = ""
    """Base address of the front that the composite is served behind, if there is one."""

    @property
    def session(self) -> "Session":
        """What this process holds for the run."""
        return _SESSIONS.setdefault(self.run_path, Session(Run(Path(self.run_path)), self.front))


@dataclass
class Session:
    """What one process holds for one run: loaded items, the server, the turn of merge branches."""

    run: Run
    front: str = ""
    """As in `ComposeContext`."""
    server: Server | None = None
    one_at_a_time: Lock = field(default_factory=Lock)
    """Held by each merge branch: they share the cores and the memory of one machine. (LangGraph's own
    `max_concurrency: 1` blocks itself when custom events are streamed.)"""
    stopping: Event = field(default_factory=Event)
    """Set to stop the run at its next sign of life."""
    _splits: dict[str, Split] = field(default_factory=dict)
    _executor: Executor[Judge] | None = None

    def split(self, name: str) -> Split:
        """Return the items of the "proxy" or "held_out" split; loaded once a process."""
        if name not in self._splits:
            self._splits[name] = split_of(self.run.recipe.evaluate, name)
        return self._splits[name]

    @property
    def executor(self) -> Executor[Judge]:
        """Where merges are tried and checkpoints scored; started on first use."""
        if self._executor is None:
            recipe = self.run.recipe
            splits = self._splits if recipe.executor == "local" else {}
            make = partial(Judge, recipe.evaluate, recipe.probes, self.run.store.root.resolve(), splits)
            self._executor = make_executor(recipe.executor, make, recipe.workers)
        return self._executor

    def advisor(self, zoo: Zoo, progress: Progress) -> Advisor:
        """Return what predicts merges of the zoo's models."""
        recipe = self.run.recipe
        return Advisor(
            base=zoo.base,
            split=self.split("proxy"),
            probes=recipe.probes,
            section=recipe.merge,
            store=self.run.store,
            executor=lambda: self.executor,  # a cluster is not joined before something is to be done
            progress=progress,
            weights=recipe.evaluate.weights,
        )

    def rest(self) -> None:
        """Let go of the models that the executor holds; it starts again when it is used again."""
        if self._executor is not None:
            self._executor.close()
            self._executor = None

    def score(self, checkpoint: Checkpoint, split: str = "proxy") -> Scores:
        """Score a checkpoint; measured once per checkpoint and items, ever."""
        return next(iter(self.executor.map("score", [(checkpoint, split)])))  # type: ignore[no-any-return]

    @property
    def known(self) -> Known:
        """What routers can find out about experts."""
        probes = self.run.recipe.probes
        texts = load_texts(probes.texts, probes.limit, probes.characters)
        return Known(
            score=self.score,
            contexts=lambda: {items.name: contexts(items) for items in self.split("proxy").tasks},
            losses=lambda experts: (texts, text_losses(experts, texts, self.run.store)),
        )

    def serving(self, composite: str, progress: Progress) -> Server:
        """Return the composite's server, started if this process has not started it yet."""
        if self.server is None:
            run = self.run
            server = Server(Path(composite), run.recipe.serve, run.logs, progress, run.store, self.front)
            self.server = server.__enter__()
        return self.server

    def close(self) -> None:
        """Stop the server and the executor, if they run."""
        self.rest()
        if self.server is not None:
            self.server.stop()
            self.server = None


def serving() -> Server | None:
    """Return what this process serves, of whatever run; one composite at a time."""
    return next((one.server for one in _SESSIONS.values() if one.server is not None), None)


def adopt(directory: Path, server: Server) -> None:
    """Let what a command serves be found, and stopped to make room, as if a run of this process served it."""
    _SESSIONS[str(directory)] = Session(Run(directory), server.front, server)


def close(but: str = "") -> None:
    """Stop what this process serves and holds, but for one run."""
    for path, session in list(_SESSIONS.items()):
        if path != but:
            session.close()


def stop() -> bool:
    """Tell all runs of this process to stop; return whether there are any."""
    for session in _SESSIONS.values():
        session.stopping.set()
    return bool(_SESSIONS)


_SESSIONS: dict[str, Session] = {}
