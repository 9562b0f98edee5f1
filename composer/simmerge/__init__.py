"""SimMerge: which merges are worth making, predicted from cheap signals with none of them made (arXiv 2601.09473).

Doors: `Advisor`, which observes models and weighs their merges; `Planner`, which weighs merges of models that were
observed; `Predictor`, what was learnt; `train`, which learns it from a corpus that `collect` made.
"""

from composer.simmerge.advisor import Advisor
from composer.simmerge.planner import Planner, Weighed
from composer.simmerge.predictor import Predictor

__all__ = ["Advisor", "Planner", "Predictor", "Weighed"]
