"""The recipe's `merge`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from composer.errors import MergeError
from composer.merging.operators import OPERATORS
from composer.merging.strategies import STRATEGIES
from composer.settings import Identifier, Section, named


class FixedMerge(Section):
    """One merge of a `fixed` strategy."""

    name: Identifier
    """The merged model's name; later merges may use it as an input."""
    models: list[Identifier] = Field(min_length=2)
    """Ids of models, or names of earlier merges, in order."""
    operator: named(OPERATORS)  # type: ignore[valid-type]
    """The merge operator."""
    parameters: dict[str, float | bool | list[float]] = {}
    """The operator's parameters; a list gives one value per model. What is not given takes its default."""

    @model_validator(mode="after")
    def _the_operator_takes_them(self) -> Self:
        try:
            OPERATORS.get(self.operator).resolve(self.operator, len(self.models), self.parameters)
        except MergeError as error:
            raise ValueError(str(error)) from None
        return self


class MergeSection(Section):
    """How a cluster becomes one model."""

    strategy: named(STRATEGIES) = "average"  # type: ignore[valid-type]
    """`average` averages greedily, `fixed` makes the merges listed, `none` merges nothing."""
    merges: list[FixedMerge] = []
    """For `fixed`: the merges, in order."""
    accept: Literal["proxy", "always"] = "proxy"
    """`proxy`: a merge that scores lower on the proxy split than the best it is made of is not kept."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """What merged weights are stored in; by default, what the sources are stored in."""
    seed: int = 0
    """Seed of operators that draw random masks."""

    @model_validator(mode="after")
    def _merges_belong_to_fixed(self) -> Self:
        if self.strategy == "fixed" and not self.merges:
            raise ValueError("strategy 'fixed' needs 'merges', a list of the merges to make")
        if self.strategy != "fixed" and self.merges:
            raise ValueError(f"'merges' is for strategy 'fixed' only; the strategy is '{self.strategy}'")
        names = [merge.name for merge in self.merges]
        if len(set(names)) < len(names):
            raise ValueError("two merges have the same name")
        return self
