"""What similarity is measured on: the part of the recipe's `cluster` that concerns the comparison."""

from typing import Literal

from pydantic import Field

from composer.settings import Section
from composer.zoo.kinds import ModuleKind

SignalName = Literal["weights", "deltas", "logits", "hidden"]


class SignalSection(Section):
    """What two models are compared by."""

    signal: SignalName = "weights"
    """weights: cosine of tensors. deltas: the same on task vectors, which start at zoo.base or an inferred base.
    logits: overlap of next-token distributions on the probe texts. hidden: linear CKA of hidden states on them."""
    modules: list[Literal["attention", "mlp", "embeddings", "norms"]] = Field(
        default=["attention", "mlp"], min_length=1
    )
    """Which tensors count, for weights and deltas."""
    per_column: bool = False
    """For weights and deltas: compare each input column of a matrix apart, as Model-GLUE does, not the whole tensor."""

    @property
    def kinds(self) -> tuple[ModuleKind, ...]:
        """The modules that count."""
        return tuple(self.modules)

    @property
    def functional(self) -> bool:
        """Whether it needs probes: a forward pass of each model."""
        return self.signal in ("logits", "hidden")
