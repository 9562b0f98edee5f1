"""Probes: what models do with a few unlabelled texts, from one forward pass each.

Doors: `record_probes`, which runs a model and keeps a small record; `compare_records`, which compares records, never
running a model again; `record_fisher` and `record_grams`, which keep what some merge operators weigh weights by.
"""

from composer.probes.behaviour import Behaviour, compare_records
from composer.probes.curvature import record_fisher, record_grams
from composer.probes.record import ProbeRecord, record_probes
from composer.probes.settings import ProbesSection
from composer.probes.texts import load_texts

__all__ = [
    "Behaviour",
    "ProbeRecord",
    "ProbesSection",
    "compare_records",
    "load_texts",
    "record_fisher",
    "record_grams",
    "record_probes",
]
