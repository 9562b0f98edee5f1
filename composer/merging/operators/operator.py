"""What a merge operator is: its parameters, what it needs, and which kernel does its arithmetic."""

from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Literal, cast

from composer.errors import MergeError
from composer.registry import nearest

if TYPE_CHECKING:
    from composer.merging.engine.kernels import Kernel

Value = float | bool | list[float | list[float]]
"""A parameter as a recipe gives it.

A parameter of the whole merge is one number, or a list of numbers, one per group of layers. A parameter of each
input is one such value for all inputs, or a list with one per input (each a number or a list over groups).
"""

Start = Literal["inputs", "base", "first"]


@dataclass(frozen=True)
class Parameter:
    """One parameter of an operator."""

    default: float | bool
    summary: str
    low: float | None = None
    """Smallest value that means anything."""
    high: float | None = None
    search: tuple[float, float] | None = None
    """The range worth searching."""
    per_input: bool = False
    open_low: bool = False
    """Whether `low` itself is excluded."""

    def check(self, operator: str, key: str, value: float | bool) -> None:
        """Refuse a value that means nothing.

        Raises:
            MergeError: naming the value and the range.
        """
        if isinstance(self.default, bool) != isinstance(value, bool):
            wanted = "true or false" if isinstance(self.default, bool) else "a number"
            raise MergeError(f"operator '{operator}': '{key}' is {wanted} (read {value})")
        low, high = self.low, self.high
        below = low is not None and (value <= low if self.open_low else value < low)
        if below or (high is not None and value > high) or value != value:
            start = "" if low is None else (f"above {low:g}" if self.open_low else f"at least {low:g}")
            end = "" if high is None else f"at most {high:g}"
            wanted = " and ".join(part for part in (start, end) if part) or "a number"
            raise MergeError(f"operator '{operator}': '{key}' must be {wanted} (read {value})")


@dataclass(frozen=True)
class Operator:
    """A way of turning several checkpoints of one shape into one."""

    summary: str
    source: str
    """Where it was published."""
    kernel: str
    """Does the arithmetic: "module:attribute", imported when it is first used."""
    parameters: dict[str, Parameter] = field(default_factory=dict)
    start: Start = "inputs"
    """What the result is built on: the inputs alone, the zoo's base ("base": works on task vectors), or the first
    input ("first": the others are brought into it)."""
    least: int = 2
    """Fewest inputs (the base is none)."""
    most: int | None = None
    method: str | None = None
    """The name mergekit knows it by; None for what mergekit has not."""
    coefficient: str | None = None
    """The parameter that says how much of what, if there is one."""
    scaled: bool = False
    """Whether the coefficient scales task vectors; else coefficients are shares of the whole."""
    normalised: str | None = None
    """The parameter that has coefficients divided by their sum, or "always"."""
    linear: bool = False
    """Whether the result is a sum of the inputs (and the base), each times a number."""
    random: bool = False
    """Whether it draws random masks."""
    statistics: str | None = None
    """What it must know of each input besides weights: "fisher" or "grams" of the probe texts."""

    def resolve(self, name: str, inputs: int, given: dict[str, Value]) -> dict[str, Value]:
        """Fill in defaults and check the number of inputs and every parameter.

        Raises:
            MergeError: for an unknown parameter, a list of the wrong length, a value without meaning or a wrong
                number of inputs.
        """
        for key, value in given.items():
            if key not in self.parameters:
                known = list(self.parameters)
                has = ", ".join(known) or "none"
                raise MergeError(f"operator '{name}' has no parameter '{key}'{nearest(key, known)} (it has: {has})")
            for number in self._numbers(name, inputs, key, value):
                self.parameters[key].check(name, key, number)
        if inputs < self.least or (self.most is not None and inputs > self.most):
            wanted = f"exactly {self.least}" if self.most == self.least else f"at least {self.least}"
            raise MergeError(f"operator '{name}' takes {wanted} models (got {inputs})")
        full = {**{key: parameter.default for key, parameter in self.parameters.items()}, **given}
        self._check_together(name, inputs, full)
        return full

    def _numbers(self, name: str, inputs: int, key: str, value: Value) -> list[float]:
        """Return all numbers of a value; refuse lists of the wrong length."""
        per_input = self.parameters[key].per_input
        if not isinstance(value, list):
            return [value]
        if per_input and len(value) != inputs:
            raise MergeError(f"operator '{name}': '{key}' takes {inputs} values, one per input (read {value})")
        lists = [one for one in value if isinstance(one, list)] if per_input else [value]
        if any(isinstance(number, list) for one in lists for number in one) or any(len(one) < 2 for one in lists):
            wanted = "a list of two or more numbers, one per group of layers and the last for all other weights"
            raise MergeError(f"operator '{name}': '{key}' takes a number or {wanted} (read {value})")
        singles = [one for one in value if not isinstance(one, list)] if per_input else []
        return [*singles, *(number for one in lists for number in one if not isinstance(number, list))]

    def _check_together(self, name: str, inputs: int, values: dict[str, Value]) -> None:
        groups = group_count(values, self)
        for group in range(groups):
            one = values_at(self, values, group, groups, inputs)
            divided = self.normalised == "always" or (self.normalised is not None and one[self.normalised])
            if self.coefficient and divided:
                coefficients = one[self.coefficient]
                total = sum(coefficients) if isinstance(coefficients, list) else coefficients
                if abs(total) < 1e-8:
                    raise MergeError(f"operator '{name}': the {self.coefficient}s sum to 0, and are divided by it")
            if "epsilon" in self.parameters and self.parameters["epsilon"].per_input:
                both = cast("list[float]", one["density"]), cast("list[float]", one["epsilon"])
                for density, epsilon in zip(*both, strict=True):
                    if density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
                        read = f"{density} ± {epsilon}"
                        raise MergeError(f"operator '{name}': density ± epsilon must lie within 0 and 1 (read {read})")

    @property
    def scale(self) -> str | None:
        """The parameter that scales the merged task vector: weights that are divided by their sum scale nothing."""
        divides = "normalize" in self.parameters and bool(self.parameters["normalize"].default)
        return "lambda" if divides and "lambda" in self.parameters else self.coefficient

    def load(self) -> "Kernel":
        """Return the kernel."""
        module, _, attribute = self.kernel.partition(":")
        kernel: Kernel = getattr(import_module(module), attribute)
        return kernel

    def searchable(self) -> dict[str, Parameter]:
        """Return the parameters that have a range worth searching."""
        return {key: parameter for key, parameter in self.parameters.items() if parameter.search}


Resolved = dict[str, float | bool | list[float]]
"""Parameters as they apply to one tensor: a number, or a list with one per input."""


def group_count(values: dict[str, Value], operator: Operator) -> int:
    """Return the number of groups that parameters are given for, 1 if none is given by groups.

    The last group is everything outside the layers.

    Raises:
        MergeError: if two parameters have different numbers of groups.
    """
    counts = set()
    for key, value in values.items():
        if isinstance(value, list):
            per_input = operator.parameters[key].per_input
            counts |= {len(one) for one in value if isinstance(one, list)} if per_input else {len(value)}
    if len(counts) > 1:
        raise MergeError(f"parameters are given for {' and for '.join(map(str, sorted(counts)))} groups of layers")
    return counts.pop() if counts else 1


def values_at(operator: Operator, values: dict[str, Value], group: int, groups: int, inputs: int) -> Resolved:
    """Return the parameters of one group of layers."""

    def single(value: float | bool | list[float] | list[float | list[float]]) -> float | bool:
        return cast("float | bool", value[group] if isinstance(value, list) else value)

    found: Resolved = {}
    for key, value in values.items():
        if operator.parameters[key].per_input:
            each = value if isinstance(value, list) else [value] * inputs
            found[key] = [single(one) for one in each]
        else:
            found[key] = single(value)
    return found


def group_of(layer: int | None, layers: int, groups: int) -> int:
    """Return the group a layer belongs to: equal runs of layers, then one group for all that is in no layer."""
    return groups - 1 if layer is None or groups == 1 else layer * (groups - 1) // layers
