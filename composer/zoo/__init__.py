"""The zoo: what checkpoints are, read from their headers and configuration alone.

Doors: `inspect_zoo`; `open_weights`, which reads any of them a few rows at a time; `make_whole`, which writes one out
as a directory.
"""

from composer.zoo.checkpoint import Checkpoint, Description, Lineage, TokenizerFingerprint, Zoo
from composer.zoo.inspection import (
    TOKENIZER_FILES,
    describe,
    describe_remote,
    inspect_checkpoint,
    inspect_zoo,
    missing_downloads,
    open_weights,
    remember_hash,
)
from composer.zoo.references import ModelReference, Source
from composer.zoo.weights import MappedWeights, SafetensorsWeights, TensorHeader, Weights, read_blocks, read_headers
from composer.zoo.whole import make_whole

__all__ = [
    "TOKENIZER_FILES",
    "Checkpoint",
    "Description",
    "Lineage",
    "MappedWeights",
    "ModelReference",
    "SafetensorsWeights",
    "Source",
    "TensorHeader",
    "TokenizerFingerprint",
    "Weights",
    "Zoo",
    "describe",
    "describe_remote",
    "inspect_checkpoint",
    "inspect_zoo",
    "make_whole",
    "missing_downloads",
    "open_weights",
    "read_blocks",
    "read_headers",
    "remember_hash",
]
