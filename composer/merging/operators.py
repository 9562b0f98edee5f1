"""Merge operators: what they are called, what they need, what their parameters default to.

The arithmetic is mergekit's. An operator is one registry entry; adding one takes one line here.
"""

from dataclasses import dataclass, field

from composer.errors import MergeError
from composer.registry import Registry, nearest

Parameter = float | bool | list[float]


@dataclass(frozen=True)
class Operator:
    """A mergekit method with sane defaults."""

    method: str
    """The name mergekit knows it by."""
    summary: str
    per_input: dict[str, float] = field(default_factory=dict)
    """Parameters with one value per input, and their defaults."""
    overall: dict[str, float | bool] = field(default_factory=dict)
    """Parameters with one value for the merge, and their defaults."""
    needs_base: bool = False
    """Whether it works on task vectors, i.e. needs the checkpoint the inputs were fine-tuned from."""
    least: int = 2
    most: int | None = None
    linear: bool = False
    """Whether the result is a weighted mean of the inputs."""

    def resolve(self, name: str, inputs: int, given: dict[str, Parameter]) -> dict[str, Parameter]:
        """Fill in defaults and check the number of inputs and every parameter.

        Raises:
            MergeError: for an unknown parameter, a list of the wrong length or a wrong number of inputs.
        """
        known = [*self.per_input, *self.overall]
        for key, value in given.items():
            if key not in known:
                has = ", ".join(known) or "none"
                raise MergeError(f"operator '{name}' has no parameter '{key}'{nearest(key, known)} (it has: {has})")
            if isinstance(value, list) and (key not in self.per_input or len(value) != inputs):
                wanted = f"{inputs} values, one per input" if key in self.per_input else "one value"
                raise MergeError(f"operator '{name}': '{key}' takes {wanted} (read {value})")
        if inputs < self.least or (self.most is not None and inputs > self.most):
            wanted = f"exactly {self.least}" if self.most == self.least else f"at least {self.least}"
            raise MergeError(f"operator '{name}' takes {wanted} models (got {inputs})")
        return {**self.per_input, **self.overall, **given}


OPERATORS: Registry[Operator] = Registry("operator")
OPERATORS.register(
    "linear",
    Operator("linear", "weighted mean", per_input={"weight": 1.0}, overall={"normalize": True}, linear=True),
)
OPERATORS.register("slerp", Operator("slerp", "spherical interpolation of two models", overall={"t": 0.5}, most=2))
OPERATORS.register(
    "task_arithmetic",
    Operator(
        "task_arithmetic",
        "base plus weighted task vectors (arXiv 2212.04089)",
        per_input={"weight": 0.4},
        overall={"lambda": 1.0, "normalize": False},
        needs_base=True,
        least=1,
    ),
)
OPERATORS.register(
    "ties",
    Operator(
        "ties",
        "trimmed task vectors with elected signs (arXiv 2306.01708)",
        per_input={"weight": 1.0, "density": 0.3},
        overall={"lambda": 1.0, "normalize": True},
        needs_base=True,
    ),
)
OPERATORS.register(
    "dare_ties",
    Operator(
        "dare_ties",
        "randomly dropped and rescaled task vectors with elected signs (arXiv 2311.03099)",
        per_input={"weight": 0.4, "density": 0.5},
        overall={"lambda": 1.0, "normalize": False},
        needs_base=True,
    ),
)
OPERATORS.register(
    "model_stock",
    Operator("model_stock", "interpolation by the angle between task vectors (arXiv 2403.19522)", needs_base=True),
)
