"""How alike the models of a zoo are.

Door: `compare`.
"""

from composer.similarity.matrix import SimilarityMatrix
from composer.similarity.streamed import compare

__all__ = ["SimilarityMatrix", "compare"]
