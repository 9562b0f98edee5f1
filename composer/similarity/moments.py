"""What one streamed pass leaves of a pair of models: inner products, tensor by tensor."""

from math import sqrt
from pathlib import Path

from composer.artefacts import Store, digest
from composer.value import Value
from composer.zoo.kinds import ModuleKind, kind_of

VERSION = 1
"""Changes when the arithmetic does; part of every cache key."""


class Moments(Value):
    """Inner products of two models, or of their task vectors, one entry per tensor.

    Where two vocabularies differ, embedding and output head are compared over the tokens both have.
    """

    names: tuple[str, ...]
    dots: tuple[float, ...]
    first_squares: tuple[float, ...]
    """Squared norm of the first model's tensor (over the shared rows)."""
    second_squares: tuple[float, ...]
    same_signs: tuple[int, ...]
    """Elements that are of one sign in both."""
    both_nonzero: tuple[int, ...]
    """Elements that are zero in neither."""
    column_cosines: tuple[float | None, ...] | None = None
    """Mean cosine of the columns of a matrix `[out, in]`, where it was asked for; None for what is no matrix."""

    def cosine(self, modules: tuple[ModuleKind, ...], *, columns: bool = False) -> float | None:
        """Return the unweighted mean of the tensors' cosines; None if no tensor has a direction in both models.

        With `columns`, each matrix counts with the mean cosine of its input columns, as in Model-GLUE (arXiv
        2410.05357, section 3); without, and where no column has a direction in both, with the cosine of the flattened
        tensor.
        """
        values = [
            value
            for index, name in enumerate(self.names)
            if kind_of(name) in modules and (value := self._cosine(index, columns)) is not None
        ]
        return sum(values) / len(values) if values else None

    def sign_agreement(self, modules: tuple[ModuleKind, ...]) -> float | None:
        """Return the share of elements of one sign among those that are zero in neither model."""
        chosen = [index for index, name in enumerate(self.names) if kind_of(name) in modules]
        both = sum(self.both_nonzero[index] for index in chosen)
        return sum(self.same_signs[index] for index in chosen) / both if both else None

    def norm_ratio(self, modules: tuple[ModuleKind, ...]) -> float | None:
        """Return the norm of the second over that of the first."""
        chosen = [index for index, name in enumerate(self.names) if kind_of(name) in modules]
        first = sum(self.first_squares[index] for index in chosen)
        return sqrt(sum(self.second_squares[index] for index in chosen) / first) if first else None

    def _cosine(self, index: int, columns: bool) -> float | None:
        if columns and self.column_cosines is not None and self.column_cosines[index] is not None:
            return self.column_cosines[index]
        scale = sqrt(self.first_squares[index]) * sqrt(self.second_squares[index])
        # Rounding may put it a hair outside.
        return max(-1.0, min(1.0, self.dots[index] / scale)) if scale else None

    def reversed(self) -> "Moments":
        """Return the same with first and second exchanged."""
        return self.model_copy(update={"first_squares": self.second_squares, "second_squares": self.first_squares})


class MomentsCache:
    """Moments of pairs by content hash; measured once, whatever zoo the two meet in."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def load(self, first: str, second: str, base: str | None, *, columns: bool) -> Moments | None:
        """Return the moments of two models given by content hash, or None if they were never measured.

        Args:
            first: Content hash.
            second: Content hash.
            base: Content hash of the base, for moments of task vectors.
            columns: Whether column cosines are needed too.
        """
        path = self._path(first, second, base)
        if not path.is_file():
            return None
        moments = Moments.load(path)
        if columns and moments.column_cosines is None:
            return None
        return moments if first <= second else moments.reversed()

    def has(self, first: str, second: str, base: str | None, *, columns: bool) -> bool:
        """Return whether `load` would find the moments, without reading them where that can be told."""
        if columns:
            return self.load(first, second, base, columns=True) is not None
        return self._path(first, second, base).is_file()

    def save(self, first: str, second: str, base: str | None, moments: Moments) -> None:
        """Keep the moments of two models."""
        (moments if first <= second else moments.reversed()).save(self._path(first, second, base))

    def is_finite(self, content_hash: str) -> bool:
        """Return whether all weights of a model have been read and found finite."""
        return self._store.path("finite", content_hash).is_file()

    def mark_finite(self, content_hash: str) -> None:
        """Remember that all weights of a model are finite."""
        path = self._store.path("finite", content_hash)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def _path(self, first: str, second: str, base: str | None) -> Path:
        key = digest(["moments", VERSION, base, *sorted((first, second))])
        return self._store.path("moments", f"{key}.json")
