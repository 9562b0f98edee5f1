"""The composite: a manifest that is enough to rebuild or serve it."""

from composer.value import Value
from composer.zoo.checkpoint import Checkpoint
from routers import RouterManifest

MANIFEST = "composite.json"


class Expert(Value):
    """One whole model of the mixture."""

    id: str
    checkpoint: Checkpoint
    members: tuple[str, ...]
    """The zoo's models it is made of."""
    examples: tuple[str, ...]
    """Requests meant for it: those of its members."""
    examples_from: str = "the recipe"
    """Where they come from."""
    reason: str
    """Why it is in the mixture, in one sentence."""


class Composite(Value):
    """What is served: experts, and the router between them."""

    name: str
    experts: tuple[Expert, ...]
    router: RouterManifest | None
    """None for a single expert, which answers everything."""
    left_out: dict[str, str] = {}
    """Models of the zoo that are in no expert, with the reason."""

    def __getitem__(self, name: str) -> Expert:
        return next(expert for expert in self.experts if expert.id == name)
