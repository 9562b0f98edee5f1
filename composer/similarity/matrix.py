"""The similarity of every pair of models."""

from composer.value import Value


class SimilarityMatrix(Value):
    """A symmetric matrix of similarities; None where two models cannot be compared."""

    ids: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    """`[models, models]`, cosines in -1..1."""
    gates: dict[str, str]
    """For a pair "a|b" that cannot be merged: the property that differs, in words."""

    def between(self, first: str, second: str) -> float | None:
        """Return the similarity of two models, or None if they cannot be compared."""
        return self.values[self.ids.index(first)][self.ids.index(second)]

    def gate(self, first: str, second: str) -> str | None:
        """Return why two models cannot be merged, or None if nothing stands against it."""
        return self.gates.get(f"{first}|{second}") or self.gates.get(f"{second}|{first}")
