"""What the tools of a conversation work with: the shelf, the runs, and one thing at a time on the machine.

Each tool calls the room that does the work; none has an implementation of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from composer.artefacts import Store
from composer.chat import answers
from composer.chat.draft import Draft
from composer.chat.shelf import Shelf, open_shelf
from composer.errors import BusyError, RecipeError
from composer.progress import Progress
from composer.runs import Run

if TYPE_CHECKING:
    from composer.clustering import ClusterSection
    from composer.similarity import SimilarityMatrix


@dataclass(frozen=True)
class Compared:
    """Models that were compared, and by what they would be grouped."""

    matrix: "SimilarityMatrix"
    section: "ClusterSection"


class Desk:
    """The tools' surroundings; one for each runs directory and zoo in a process."""

    def __init__(self, root: Path, zoo: Path | None) -> None:
        self.root = root
        self.store = Store(root / "store")
        self.shelf: Shelf = open_shelf(zoo, self.store)
        self.run: Run | None = None
        """The run that is worked on in this process."""
        self.compared: Compared | None = None
        """What was compared last, outside of a run."""

    @contextmanager
    def working(self, what: str, run: Run | None = None) -> Iterator[None]:
        """Hold the machine for one run: two would share its memory.

        Raises:
            BusyError: if another conversation has one going, with its name.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        note = self.root / "working"
        try:
            with FileLock(self.root / "working.lock", timeout=0):
                note.write_text(what)
                self.run = run
                try:
                    yield
                finally:
                    self.run = None
                    note.unlink(missing_ok=True)
        except Timeout:
            other = note.read_text() if note.is_file() else "another run"
            raise BusyError(
                f"{other} is going on in another conversation; wait for its end, or cancel it there"
            ) from None

    def working_on(self) -> str | None:
        """Return what is being run now, in whatever process, or None."""
        try:
            with FileLock(self.root / "working.lock", timeout=0):
                return None
        except Timeout:
            note = self.root / "working"
            return note.read_text() if note.is_file() else "a run"

    def compare(self, draft: Draft, names: tuple[str, ...], progress: Progress) -> str:
        """Say how similar models are, and which may be merged."""
        from composer.similarity import compare
        from composer.zoo import inspect_zoo

        for name in names:
            self.shelf.check(name)
        chosen = names if len(names) > 1 else draft.models
        entries = [self.shelf.entry(name) for name in chosen]
        document = {**draft.document, "zoo": {**draft.document["zoo"], "models": entries}}
        for key in ("merge", "cluster"):  # what they say of other models does not matter here
            document[key] = {k: v for k, v in document.get(key, {}).items() if k not in ("merges", "strategy", "apart")}
        recipe = Draft(document={**document, "evaluate": document.get("evaluate") or {"tasks": ["none"]}}).recipe
        zoo = inspect_zoo(recipe.zoo, self.store, progress)
        matrix = compare(zoo, self.store, recipe.cluster, recipe.probes, progress=progress)
        self.compared = Compared(matrix=matrix, section=recipe.cluster)
        lines = []
        for place, first in enumerate(matrix.ids):
            for second in matrix.ids[place + 1 :]:
                gate, value = matrix.gate(first, second), matrix.between(first, second)
                said = (
                    f"cannot be merged: {gate}" if gate else f"{value:.4f}" if value is not None else "not comparable"
                )
                lines.append(f"  {first} and {second}: {said}")
        threshold = recipe.cluster.threshold
        return "\n".join([f"{matrix.signal} (from {threshold:g} on they belong together):", *lines])

    def route(self, run: Run, prompt: str) -> str:
        """Say which expert a prompt goes to."""
        from composer.mixture import Composite, load_router

        directory = run.composite.resolve()
        router = load_router(directory)
        if router is None:
            only = Composite.open(directory).experts[0].id
            return f"{only}: the composite has a single expert, which answers everything"
        decision = router.route(prompt)
        chances = router.manifest.policy.probabilities(decision.scores)
        shares = ", ".join(f"{name} {chances[name]:.2f}" for name in sorted(chances, key=lambda one: -chances[one]))
        return f"{decision.expert} ({decision.reason}); probabilities: {shares}"

    def explain(self, run: Run, name: str | None) -> str:
        """Say why a model is in the composite or not."""
        from composer.merging.plan import MergeOutcome
        from composer.mixture.composite import Composite

        outcomes = [MergeOutcome.load(file) for file in sorted(run.path.glob("outcome-*.json"))]
        return answers.reason_in_words(name, Composite.open(run.composite.resolve()), outcomes)

    def evidence(self, run: Run) -> str:
        """Show what the composite gained."""
        from composer.evaluation.evidence import Evidence

        return answers.evidence_in_words(Evidence.load(run.path / "evidence.json"))

    def status(self, serving: str | None, finished: list[str]) -> str:
        """Say what is running, served and done."""
        lines = [f"running: {self.working_on() or 'nothing'}", f"served: {serving or 'nothing'}"]
        for run in Run.all(self.root)[:5]:
            events = run.events()
            stage = "done" if run.finished else f"stopped in '{events[-1]['stage']}'" if events else "planned"
            here = ", of this conversation" if str(run.path) in finished else ""
            lines.append(f"  {run.name}: {stage}{here}")
        return "\n".join(lines)


def composed(run: str | None) -> Run:
    """Return a run that has a composite.

    Raises:
        RecipeError: if there is none yet.
    """
    if run is None or not Run(Path(run)).composite.exists():
        raise RecipeError("there is no composite yet; say what to merge, and 'run'")
    return Run(Path(run))


def is_yes(answer: str) -> bool:
    """Return whether an answer agrees, and says nothing else."""
    said = " ".join("".join(one if one.isalnum() else " " for one in answer.lower()).split())
    return said in _YES


def is_no(answer: str) -> bool:
    """Return whether an answer refuses, and says nothing else."""
    said = " ".join("".join(one if one.isalnum() or one == "'" else " " for one in answer.lower()).split())
    return said in _NO


_YES = {
    "y", "yes", "yes please", "ok", "okay", "go", "go ahead", "yes go ahead", "sure", "do it", "yes do it", "run",
    "run it", "proceed", "fine", "approve", "approved", "i agree", "agreed", "start", "start it",
    "yep", "yeah", "please do",
}  # fmt: skip
_NO = {
    "n", "no", "no thanks", "no thank you", "nope", "stop", "cancel", "don't", "do not", "abort", "not now",
    "never mind", "nevermind", "forget it", "leave it",
}  # fmt: skip
