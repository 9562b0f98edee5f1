"""How alike the models of a zoo are.

Door: `compare`.
"""

from composer.similarity.compare import compare
from composer.similarity.matrix import SimilarityMatrix
from composer.similarity.settings import SignalSection

__all__ = ["SignalSection", "SimilarityMatrix", "compare"]
