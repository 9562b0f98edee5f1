"""Which models belong together.

Door: `cluster`.
"""

from typing import Literal

from pydantic import Field

from composer.settings import Section
from composer.similarity import SimilarityMatrix
from composer.value import Value


class ClusterSection(Section):
    """Which models may be merged with each other."""

    signal: Literal["weights"] = "weights"
    """What similarity is measured on: cosine of whole weight tensors."""
    threshold: float = Field(default=0.95, ge=-1, le=1)
    """The least similarity at which two models of the same shape belong together."""


class Cluster(Value):
    """Models that may be merged with each other; a loner is a cluster of one."""

    id: str
    members: tuple[str, ...]
    representative: str
    """The medoid: the member most similar to all others."""
    reason: str
    """Why these belong together, or why this one stands alone, in one sentence."""


class Clusters(Value):
    """All clusters of a zoo; every model is in exactly one."""

    clusters: tuple[Cluster, ...]


def cluster(matrix: SimilarityMatrix, threshold: float) -> tuple[Cluster, ...]:
    """Put every model into exactly one cluster.

    Two models are linked when nothing gates them (architecture, shapes, tokenizer, settings) and their
    similarity is at least `threshold`; clusters are the connected components, in the zoo's order.
    """
    unseen = list(matrix.ids)
    components: list[list[str]] = []
    while unseen:
        component, frontier = [], [unseen.pop(0)]
        while frontier:
            current = frontier.pop()
            component.append(current)
            linked = [other for other in unseen if _linked(matrix, current, other, threshold)]
            unseen = [other for other in unseen if other not in linked]
            frontier.extend(linked)
        components.append(sorted(component, key=matrix.ids.index))
    return tuple(
        Cluster(
            id=f"cluster-{number}",
            members=tuple(members),
            representative=_medoid(matrix, members),
            reason=_reason(matrix, members, threshold),
        )
        for number, members in enumerate(components, start=1)
    )


def _linked(matrix: SimilarityMatrix, first: str, second: str, threshold: float) -> bool:
    value = matrix.between(first, second)
    return matrix.gate(first, second) is None and value is not None and value >= threshold


def _medoid(matrix: SimilarityMatrix, members: list[str]) -> str:
    def total(name: str) -> float:
        return sum(matrix.between(name, other) or 0.0 for other in members)

    return max(members, key=total)


def _reason(matrix: SimilarityMatrix, members: list[str], threshold: float) -> str:
    if len(members) > 1:
        values = [matrix.between(a, b) or 0.0 for a in members for b in members if a != b]
        return f"same architecture, shapes and tokenizer; weight cosines {min(values):.6f} to {max(values):.6f}"
    name = members[0]
    others = [other for other in matrix.ids if other != name]
    if not others:
        return "the only model of the zoo"
    comparable = [other for other in others if matrix.gate(name, other) is None]
    if comparable:
        nearest = max(comparable, key=lambda other: matrix.between(name, other) or -1.0)
        value = matrix.between(name, nearest) or 0.0
        return f"its nearest neighbour, {nearest}, has weight cosine {value:.4f}, below the threshold {threshold}"
    gates: dict[str, list[str]] = {}
    for other in others:
        gates.setdefault(matrix.gate(name, other) or "", []).append(other)
    return f"no other model fits: {'; '.join(f'{gate}: {_few(names)}' for gate, names in gates.items())}"


def _few(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"
