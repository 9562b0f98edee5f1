"""The similarity of every pair of models."""

from composer.value import Value


class SimilarityMatrix(Value):
    """A symmetric matrix of similarities; None where two models cannot be compared."""

    ids: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    """`[models, models]`, in -1..1; 1 for the same behaviour or weights."""
    gates: dict[str, str]
    """For a pair "a|b" that cannot be merged: the property that differs, in words."""
    signal: str = "weight cosine"
    """What was measured, in words."""
    undefined: dict[str, str] = {}
    """For a pair "a|b" that could be merged but has no similarity by this signal: why."""
    notes: dict[str, str] = {}
    """For a pair "a|b" that may be merged: what is to be known about it."""
    bases: dict[str, str] = {}
    """Id of the zoo's base, by each model that could be merged with it."""
    base: str | None = None
    """Id of the model that task vectors start from, where one is known."""
    base_reason: str | None = None
    """How it is known."""
    skipped: dict[str, str] = {}
    """Models left out since their weights cannot be used, with the reason."""
    read_bytes: int = 0
    """Bytes of weights read; zero if everything was known before."""
    record_bytes: dict[str, int] = {}
    """Size of each model's probe record, where there are probes."""

    def between(self, first: str, second: str) -> float | None:
        """Return the similarity of two models, or None if they cannot be compared."""
        return self.values[self.ids.index(first)][self.ids.index(second)]

    def gate(self, first: str, second: str) -> str | None:
        """Return why two models cannot be merged, or None if nothing stands against it."""
        return _of_pair(self.gates, first, second)

    def why_undefined(self, first: str, second: str) -> str | None:
        """Return why two models that could be merged have no similarity, or None."""
        return _of_pair(self.undefined, first, second)

    def note(self, first: str, second: str) -> str | None:
        """Return what is to be known about merging two models, or None."""
        return _of_pair(self.notes, first, second)


def _of_pair(table: dict[str, str], first: str, second: str) -> str | None:
    return table.get(f"{first}|{second}") or table.get(f"{second}|{first}")
