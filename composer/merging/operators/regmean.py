"""RegMean: the linear layer that comes closest to what each input's layer gives on its own inputs."""

from composer.merging.operators.operator import Operator, Parameter

OPERATOR = Operator(
    "linear layers merged in closed form to give what the inputs' layers give on the probe texts",
    "arXiv 2212.09849",
    "composer.merging.engine.statistical:regmean",
    {"alpha": Parameter(0.9, "factor of what is off the diagonal of the inner products", 0, 1, (0.1, 1.0))},
    statistics="grams",
)
