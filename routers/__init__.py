"""Routers: how a prompt finds its expert.

A router maps the user's text to one score per expert; a policy turns the scores into a decision. Neither sees padding
or batch mates: the same text gives the same expert, always. Adding a router takes one file and one line here.
"""

from typing import TYPE_CHECKING, Literal, Protocol

from composer.registry import Registry
from composer.value import Value
from routers.policy import Decision, Policy

if TYPE_CHECKING:
    from pathlib import Path


class Candidate(Value):
    """An expert as a router sees it."""

    id: str
    path: str
    parameters: int
    remote_code: bool = False
    """Whether the checkpoint's own Python code may run."""
    examples: tuple[str, ...] = ()
    groups: tuple[int, ...] = ()
    """How many of the examples belong together, in their order: those of each model that a merged expert is made of.
    Empty if they are all of one kind."""
    reads: bool = True
    """Whether its layers may read prompts."""

    @property
    def kinds(self) -> tuple[int, ...]:
        """How many examples there are of each kind of request."""
        return tuple(count for count in self.groups if count) or (len(self.examples),)


class Labelled(Value):
    """A text and the experts it should go to."""

    text: str
    shares: dict[str, float]
    """Adds up to one; a text that two experts answer equally well has a half for each."""


class EncoderManifest(Value):
    """What reads the prompt."""

    kind: Literal["layers", "sentence", "table"]
    """The first layers of a causal model, a sentence encoder, or a table of token vectors made from one of these."""
    source: str
    """Id of an expert; of a sentence encoder, its directory or hub id."""
    layers: int | None = None
    """How many layers; 0 is the embedding alone, None is all of a sentence encoder."""

    @property
    def in_words(self) -> str:
        """What reads the prompt, for people."""
        whole = self.source
        if self.layers is not None:
            whole = f"the first {self.layers} layers of {whole}" if self.layers else f"the embedding of {whole}"
        return f"a table of token vectors made from {whole}" if self.kind == "table" else whole


class Brief(Value):
    """What a router is to be built for."""

    candidates: tuple[Candidate, ...]
    policy: Policy
    encoder: str = "auto"
    """Id of a candidate, a sentence encoder's directory or hub id, or "auto"."""
    layer: int | Literal["auto"] = "auto"
    most_layers: int | None = None
    """Bound on `layer: auto`."""
    table: bool = False
    """Whether to replace the encoder by a table of token vectors made from it."""
    labelled: tuple[Labelled, ...] = ()
    """Beside the candidates' examples, for routers that learn."""
    seed: int = 0


class RouterManifest(Value):
    """How a router was built; enough to load it, together with its files."""

    kind: str
    experts: tuple[str, ...]
    policy: Policy
    owners: tuple[int, ...] = ()
    """Place among the experts of the one that each gate is for; empty if each has one, in their order."""
    encoder: EncoderManifest | None = None
    """None for a router that does not read."""
    leave_one_out: float | None = None
    """Share of the example requests that find their own expert when left out, mean over experts; None if no expert has
    two."""
    confusions: dict[str, int] = {}
    """"expert -> other": how many examples of one went to the other, left out."""
    condition: float | None = None
    """Condition number of the gates' directions: 1 if they are orthogonal, large if some are nearly the same."""
    learnt_from: int = 0
    """Labelled texts beside the examples."""
    warnings: tuple[str, ...] = ()


class Router(Protocol):
    """Routes texts to experts."""

    manifest: RouterManifest

    def route(self, text: str) -> Decision:
        """Return the expert for one text."""
        ...


class RouterKind(Protocol):
    """Builds, saves and loads routers of one kind."""

    def build(self, brief: Brief, directory: "Path") -> RouterManifest:
        """Build a router and write its files into `directory`.

        Raises:
            RouterError: if it cannot be built from what the brief holds.
        """
        ...

    def load(self, manifest: RouterManifest, directory: "Path", candidates: "tuple[Candidate, ...]") -> Router:
        """Load what `build` wrote; `candidates` are the experts at the places where they are now."""
        ...


ROUTERS: Registry[RouterKind] = Registry("router")
ROUTERS.register("prompt", "routers.prompt:kind")
ROUTERS.register("linear", "routers.linear:kind")
ROUTERS.register("mlp", "routers.mlp:kind")
ROUTERS.register("prompt_glue", "routers.prompt_glue:kind")
ROUTERS.register("fixed", "routers.simple:fixed")
ROUTERS.register("random", "routers.simple:random")
ROUTERS.register("oracle", "routers.simple:oracle")
SIMPLE = ("fixed", "random", "oracle")
"""Routers that read no examples."""

__all__ = [
    "ROUTERS", "SIMPLE", "Brief", "Candidate", "Decision", "EncoderManifest", "Labelled", "Policy", "Router",
    "RouterKind", "RouterManifest",
]  # fmt: skip
