"""Fisher-weighted averaging: each weight counts as much as its model cares about it."""

from composer.merging.operators.operator import Operator, Parameter

OPERATOR = Operator(
    "mean of the inputs, weight by weight, by the Fisher information of the probe texts",
    "arXiv 2111.09832",
    "composer.merging.engine.statistical:fisher",
    {
        "weight": Parameter(1.0, "how much of each input", search=(0.0, 1.0), per_input=True),
        "floor": Parameter(1e-8, "added to every Fisher value, relative to the tensor's mean", 0, open_low=True),
    },
    coefficient="weight",
    normalised="always",
    statistics="fisher",
)
