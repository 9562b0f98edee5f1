"""Routers: how a prompt finds its expert.

A router maps the user's text to one score per expert. It never sees padding or batch mates: the same text gives
the same expert, always. Adding a router takes one file and one line here.
"""

from typing import TYPE_CHECKING, Protocol

from composer.registry import Registry
from composer.value import Value

if TYPE_CHECKING:
    from pathlib import Path


class Decision(Value):
    """Where one prompt goes, and how clear that was."""

    expert: str
    scores: dict[str, float]
    """One score per expert; the highest wins."""
    margin: float
    """Difference between the best two scores."""
    abstained: bool = False
    """Whether the margin was too small, so that the fallback expert answers."""


class Candidate(Value):
    """An expert as a router sees it when it is built."""

    id: str
    path: str
    parameters: int
    remote_code: bool = False
    """Whether the checkpoint's own Python code may run."""
    examples: tuple[str, ...]


class RouterManifest(Value):
    """How a router was built; enough to load it, together with its weights file."""

    kind: str
    experts: tuple[str, ...]
    encoder: str
    """Id of the expert whose first layers read the prompt."""
    layer: int
    """How many of its layers; 0 is the embedding alone."""
    leave_one_out: float | None
    """Share of the example requests that find their own expert when left out; None with one example each."""
    confusions: dict[str, int] = {}
    """"expert -> other": how many examples of one went to the other, left out."""
    margin: float
    fallback: str
    warnings: tuple[str, ...] = ()


class Router(Protocol):
    """Routes texts to experts."""

    manifest: RouterManifest

    def route(self, text: str) -> Decision:
        """Return the expert for one text."""
        ...


class RouterKind(Protocol):
    """Builds, saves and loads routers of one kind."""

    def build(
        self,
        candidates: list[Candidate],
        directory: "Path",
        *,
        encoder: str,
        layer: int | str,
        margin: float,
        fallback: str,
    ) -> RouterManifest:
        """Build a router for the candidates and write its weights into `directory`."""
        ...

    def load(
        self, manifest: RouterManifest, directory: "Path", encoder_path: str, *, remote_code: bool = False
    ) -> Router:
        """Load what `build` wrote."""
        ...


ROUTERS: Registry[RouterKind] = Registry("router")
ROUTERS.register("prompt", "routers.prompt:kind")
