"""The recipe's `mixture`."""

from typing import Annotated, Literal

from pydantic import Field

from composer.settings import Identifier, Section, named
from composer.value import Value
from routers import ROUTERS


class RouterSection(Section):
    """How a prompt finds its expert."""

    kind: named(ROUTERS) = "prompt"  # type: ignore[valid-type]
    """`prompt` is initialised from example requests, without training."""
    encoder: Identifier | Literal["auto"] = "auto"
    """The expert whose first layers read the prompt; `auto` takes the one that separates the examples best."""
    layer: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """How many of its layers; `auto` chooses by leave-one-out on the examples."""
    margin: float = Field(default=0.0, ge=0)
    """Below this difference between the best two scores, the fallback expert answers."""
    fallback: Identifier | Literal["auto"] = "auto"
    """The expert that answers unclear prompts; `auto` takes the best on the proxy split."""


class MixtureSection(Section):
    """How experts that cannot be merged are combined."""

    level: Literal["model"] = "model"
    """Whole models, one chosen per prompt."""
    router: RouterSection = RouterSection()
    top_k: Literal[1] = 1
    """How many experts answer one prompt."""


class LayerSettings(Value):
    """How experts are mixed inside one model."""

    dense_layers: int = Field(default=0, ge=0)
    """The first layers, which are the dense model's alone."""
    top_k: int = Field(default=1, ge=1)
    """How many experts work on one token, or one prompt."""
    routing: Literal["token", "sample"] = "token"
    """Whether each token goes its own way, or all of an answer goes the way that its prompt decides."""
    shared_gate: bool = False
    """Whether one gate, before the first layer of experts, decides for all layers."""
