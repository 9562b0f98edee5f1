"""What a search took: the price of what it found."""

from collections.abc import Iterable

from composer.value import Value


class SearchCost(Value):
    """What the search for merges took; what was known from earlier runs counts as much as when it was measured."""

    tried: int = 0
    """Candidates that were merged in memory, each once however often it was met."""
    failed: int = 0
    """How many of them could not be made or scored."""
    kept: int = 0
    """Merges that were written: the results, and what they were made from where one was merged into another."""
    items: int = 0
    """Proxy items that candidates were scored on, all candidates added up."""
    models: int = 0
    """Checkpoints that were scored on the whole proxy split besides."""
    merge_seconds: float = 0.0
    """Time to merge the candidates."""
    score_seconds: float = 0.0
    """Time to score them."""
    written_bytes: int = 0
    """Weights of the merges that were written."""

    @classmethod
    def total(cls, costs: "Iterable[SearchCost]") -> "SearchCost":
        """Return several searches as one."""
        rows = [one.model_dump() for one in costs]
        return cls(**{key: sum(row[key] for row in rows) for key in cls.model_fields})
