"""Arms: the ways of merging that are weighed against one another, each an operator with a setting for any number."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from composer.errors import MergeError
from composer.merging.operators import OPERATORS
from composer.merging.plan import MergeStep

Setting = dict[str, float]


@dataclass(frozen=True)
class Arm:
    """An operator with a setting."""

    operator: str
    setting: Setting = field(default_factory=dict)
    """Parameters of the whole merge."""
    keeps: float | None = None
    """What the merge so far keeps of the whole when one more comes; by default every input counts the same."""

    @property
    def label(self) -> str:
        """The arm's name, e.g. "task_arithmetic weight 0.7"."""
        words = [self.operator, *(f"{key} {value:g}" for key, value in self.setting.items())]
        return " ".join([*words, *([f"keeps {self.keeps:g}"] if self.keeps is not None else [])])

    @property
    def ordered(self) -> bool:
        """Whether the order of the inputs makes a difference."""
        return self.keeps is not None or OPERATORS.get(self.operator).most == 2

    def parameters(self, count: int) -> dict[str, float | bool | list[float | list[float]]]:
        """Return the parameters for so many inputs."""
        found: dict[str, float | bool | list[float | list[float]]] = dict(self.setting)
        if self.keeps is not None:
            # One after another: each newcomer takes its share of the whole from all that were there before.
            shares = [self.keeps ** (count - 1), *((1 - self.keeps) * self.keeps**later for later in range(count - 1))]
            first, *rest = shares
            found["weight"] = [first, *reversed(rest)]
        return found

    def steps(self, sources: Sequence[str], name: str) -> list[MergeStep]:
        """Return the merges that make one model of some sources, in order; the last one is called `name`.

        An operator that takes two models at a time makes a chain, all others one merge of everything.
        """
        if OPERATORS.get(self.operator).most != 2 or len(sources) == 2:
            parameters = self.parameters(len(sources))
            return [MergeStep(name=name, operator=self.operator, inputs=tuple(sources), parameters=parameters)]
        steps: list[MergeStep] = []
        current = sources[0]
        for number, newcomer in enumerate(sources[1:], start=1):
            own = name if number == len(sources) - 1 else f"{name}-{number}"
            inputs, parameters = (current, newcomer), self.parameters(2)
            steps.append(MergeStep(name=own, operator=self.operator, inputs=inputs, parameters=parameters))
            current = own
        return steps


ARMS: dict[str, tuple[Arm, ...]] = {
    "linear": (Arm("linear"), Arm("linear", keeps=0.7), Arm("linear", keeps=0.3)),
    "slerp": (Arm("slerp", {"t": 0.5}),),
    "task_arithmetic": tuple(Arm("task_arithmetic", {"weight": one}) for one in (0.4, 0.7, 1.0)),
    "ties": (Arm("ties", {"lambda": 1.0}), Arm("ties", {"lambda": 1.5})),
    "dare_ties": (Arm("dare_ties", {"weight": 0.5}), Arm("dare_ties", {"weight": 0.8})),
    "dare_linear": (Arm("dare_linear", {"weight": 0.7}),),
    "della": (Arm("della", {"lambda": 1.0}),),
    "breadcrumbs": (Arm("breadcrumbs", {"weight": 0.7}),),
    "model_stock": (Arm("model_stock"),),
    "sce": (Arm("sce"),),
    "ram": (Arm("ram"),),
    "arcee_fusion": (Arm("arcee_fusion"),),
}
"""The settings of each operator that are weighed; another operator is weighed with its defaults."""


def arms_of(operators: Sequence[str]) -> list[Arm]:
    """Return the arms of some operators.

    Raises:
        MergeError: for an operator that does not blend models, or that a sample of weights does not describe.
    """
    found: list[Arm] = []
    for name in operators:
        operator = OPERATORS.get(name)
        if name == "passthrough" or operator.statistics:
            why = "stacks layers" if name == "passthrough" else "goes by statistics of whole models"
            known = ", ".join(ARMS)
            raise MergeError(f"operator '{name}' {why}; nothing predicts it (take of: {known})")
        found += ARMS.get(name, (Arm(name),))
    return found
