"""Evaluation: what a checkpoint or a served composite scores, item by item.

Doors: `load_tasks`, `score_checkpoint` (in process), `score_endpoint` (through the OpenAI API),
`weigh_evidence`.
"""

from composer.evaluation.evidence import Difference, Evidence, Subject, weigh_evidence
from composer.evaluation.scores import Scores, TaskScore

__all__ = ["Difference", "Evidence", "Scores", "Subject", "TaskScore", "weigh_evidence"]
