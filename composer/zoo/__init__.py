"""The zoo: what checkpoints are, read from their headers and configuration alone.

Door: `inspect_zoo`.
"""

from composer.zoo.checkpoint import Checkpoint, Lineage, TokenizerFingerprint, Zoo
from composer.zoo.inspection import inspect_checkpoint, inspect_zoo
from composer.zoo.weights import TensorHeader, read_headers, read_rows

__all__ = [
    "Checkpoint",
    "Lineage",
    "TensorHeader",
    "TokenizerFingerprint",
    "Zoo",
    "inspect_checkpoint",
    "inspect_zoo",
    "read_headers",
    "read_rows",
]
