"""Merge operators: what they are called, what they need, what their parameters default to.

An operator is an entry: in `stock.py` for mergekit's, a file of its own for others, or of another distribution by
the entry point group ``model_composer.operator``. (Nothing here needs torch; kernels are imported on use.)
"""

from composer.merging.operators.operator import Operator, Parameter, Resolved, Value, group_count, group_of, values_at
from composer.merging.operators.stock import STOCK
from composer.registry import Registry

__all__ = ["OPERATORS", "Operator", "Parameter", "Resolved", "Value", "group_count", "group_of", "values_at"]

OPERATORS: Registry[Operator] = Registry("operator")
for _name, _operator in STOCK.items():
    OPERATORS.register(_name, _operator)
OPERATORS.register("fisher", "composer.merging.operators.fisher:OPERATOR")
OPERATORS.register("regmean", "composer.merging.operators.regmean:OPERATOR")
