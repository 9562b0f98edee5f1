"""How a merge grows by one model, operator by operator, and what its sources count in it."""

from dataclasses import dataclass, field, replace

from composer.evaluation.scores import Scores
from composer.merging.operators import OPERATORS, Operator
from composer.merging.plan import MergeStep


@dataclass(frozen=True)
class Growth:
    """What has been merged so far, and how it is made from its sources at once.

    A merge of many inputs is always made anew from the sources, so nothing is rounded on the way; only an operator
    that takes two models at a time goes on from a checkpoint.
    """

    operator: str
    sources: tuple[str, ...]
    """Members in it, in the order they came."""
    scores: Scores
    step: MergeStep | None = None
    """How it is made; None as long as it is a member."""
    weights: dict[str, float] = field(default_factory=dict)
    """What each source counts, as the operator's coefficients have it."""

    @property
    def kind(self) -> Operator:
        """The operator."""
        return OPERATORS.get(self.operator)

    @property
    def current(self) -> str:
        """The name of the checkpoint that stands for it."""
        return self.step.name if self.step else self.sources[0]

    def candidates(self, newcomer: str, coefficients: tuple[float, ...], name: str) -> list[MergeStep]:
        """Return the ways of merging one more model in.

        Args:
            newcomer: The model.
            coefficients: Between 0 and 1. For shares, what the merge so far keeps of the whole, as in Model-GLUE
                (arXiv 2410.05357, section 3.2); for task vectors, what each of them is multiplied by, as in
                task arithmetic (arXiv 2212.04089); none for the plain average.
            name: What the candidates are called.
        """
        operator = self.kind
        pairwise = operator.most == 2
        inputs = (self.current, newcomer) if pairwise else (*self.sources, newcomer)
        count = len(self.sources) + 1
        key = operator.scale if operator.scaled else operator.coefficient
        plain = not coefficients and operator.scaled and key != operator.coefficient  # a mean as it is
        if key is None or plain:
            return [MergeStep(name=name, operator=self.operator, inputs=inputs)]
        coefficients = coefficients or ((1 / count,) if operator.scaled else ((count - 1) / count,))
        return [
            MergeStep(
                name=name, operator=self.operator, inputs=inputs, parameters={key: self._value(coefficient, pairwise)}
            )
            for coefficient in coefficients
        ]

    def _value(self, coefficient: float, pairwise: bool) -> float | list[float | list[float]]:
        operator = self.kind
        if operator.scaled:
            return coefficient
        parameter = operator.parameters[str(operator.coefficient)]
        if not parameter.per_input:  # a place between the two, 0 for what there is
            low, high = parameter.search or (0.0, 1.0)
            return round(low + (high - low) * (1 - coefficient), 12)
        shares = [1.0] if pairwise else [self.weights.get(name, 1.0) for name in self.sources]
        total = sum(shares)
        return [*(round(coefficient * share / total, 12) for share in shares), round(1 - coefficient, 12)]

    def grown(self, step: MergeStep, newcomer: str, scores: Scores) -> "Growth":
        """Return the merge with one more model in it."""
        sources = (*self.sources, newcomer)
        value = step.parameters.get(str(self.kind.coefficient))
        weights = {}
        if self.kind.most != 2 and value is not None:
            each = value if isinstance(value, list) else [value] * len(sources)
            weights = {name: one for name, one in zip(sources, each, strict=True) if isinstance(one, (int, float))}
        return replace(self, sources=sources, scores=scores, step=step, weights=weights)


def flat_weights(step: MergeStep, made: dict[str, dict[str, float]], base: str | None) -> dict[str, float]:
    """Return what each source counts in a merge, if it is a weighted sum of them.

    Args:
        step: The merge.
        made: The same of merges that are among its inputs; empty for one that is no weighted sum.
        base: The base's id.

    Returns:
        By id, the base's too where the operator works on task vectors; empty if it is no weighted sum, or layers
        have coefficients of their own.
    """
    operator = OPERATORS.get(step.operator)
    if not operator.linear:
        return {}
    values = operator.resolve(step.operator, len(step.inputs), step.parameters)
    given = values["weight"]
    each = given if isinstance(given, list) else [given] * len(step.inputs)
    if any(isinstance(one, list) for one in each) or any(
        isinstance(values.get(key), list) for key in values if key != "weight"
    ):
        return {}
    shares = [float(one) for one in each if not isinstance(one, list)]
    if values["normalize"]:
        total = sum(shares)
        shares = [one / total for one in shares] if abs(total) >= 1e-8 else shares
    flat: dict[str, float] = {}
    if operator.start == "base":
        scale = values["lambda"]
        shares = [one * float(scale) for one in shares if not isinstance(scale, list)]
        flat[base or "base"] = 1 - sum(shares)
    for name, share in zip(step.inputs, shares, strict=True):
        own = made.get(name, {name: 1.0})
        if not own:
            return {}
        for source, part in own.items():
            flat[source] = flat.get(source, 0.0) + share * part
    return {name: round(value, 12) for name, value in flat.items()}
