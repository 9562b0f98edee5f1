"""Evaluation: what a checkpoint or a served composite scores, item by item.

Doors: `tasks.load_split`, `in_process.score_checkpoint`, `served.score_endpoint` (through the OpenAI API),
`baselines.without_a_router`, `weigh_evidence`, `sandbox.run` for generated code.
"""

from composer.evaluation.evidence import Difference, Evidence, Subject, TaskDifference, weigh_evidence
from composer.evaluation.scores import Scores, TaskScore

__all__ = ["Difference", "Evidence", "Scores", "Subject", "TaskDifference", "TaskScore", "weigh_evidence"]
