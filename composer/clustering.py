"""Which models belong together.

Doors: `cluster`, and `suggest`, which says where the natural gap lies.
"""

from itertools import combinations, pairwise
from typing import Literal

from pydantic import Field

from composer.settings import Identifier
from composer.similarity import SignalSection, SimilarityMatrix
from composer.value import Value


class ClusterSection(SignalSection):
    """Which models may be merged with each other."""

    method: Literal["components", "leader", "agglomerative"] = "components"
    """components: linked pairs, and what they link to. leader: a model joins the first cluster whose first model is
    similar enough, as in Model-GLUE. agglomerative: clusters are joined while their mean similarity is high enough."""
    threshold: float = Field(default=0.95, ge=-1, le=1)
    """The least similarity at which two models belong together; `model-composer cluster --suggest` finds one."""
    apart: list[Identifier] = []
    """Ids of models that are merged with nothing, whatever they resemble: they stay whole."""


class Cluster(Value):
    """Models that may be merged with each other; a loner is a cluster of one."""

    id: str
    members: tuple[str, ...]
    representative: str
    """The zoo's base, a member or not, if it could be merged with the members; else the medoid: the member most
    similar to all others. A loner represents itself."""
    reason: str
    """Why these belong together, or why this one stands alone, in one sentence."""
    notes: tuple[str, ...] = ()
    """What is to be known before they are merged."""


class Clusters(Value):
    """All clusters of a zoo; every model is in exactly one."""

    clusters: tuple[Cluster, ...]


class Suggestion(Value):
    """Where a zoo falls apart by itself."""

    threshold: float | None
    """In the middle of the widest gap; None if no similarity is defined."""
    above: float | None = None
    """The lowest similarity that still joins clusters."""
    below: float | None = None
    """The highest that no longer does; None if there is none."""
    clusters: int = 0
    """Clusters at that threshold, loners included."""

    def in_words(self) -> str:
        """Return the suggestion as a sentence."""
        if self.threshold is None:
            return "no threshold to suggest: no two models can be compared and merged"
        gap = f"between {self.above:.6f} and {self.below:.6f}" if self.below is not None else f"below {self.above:.6f}"
        count = f"{self.clusters} cluster{'s' if self.clusters != 1 else ''}"
        return f"the widest gap lies {gap}: cluster.threshold={self.threshold:.6g} gives {count}"


class Join(Value):
    """Two groups of models becoming one, at a similarity."""

    first: tuple[int, ...]
    """Places of models in the matrix."""
    second: tuple[int, ...]
    similarity: float


def cluster(matrix: SimilarityMatrix, section: ClusterSection) -> tuple[Cluster, ...]:
    """Put every model into exactly one cluster.

    Two models that may not be merged (architecture, shapes, tokenizer, settings) are never in one cluster.

    Args:
        matrix: From `compare`.
        section: Method and threshold.
    """
    matrix = _kept_apart(matrix, section)
    if section.method == "leader":
        groups = _leaders(matrix, section.threshold)
    else:
        groups = _groups(matrix, [join for join in joins(matrix, section) if join.similarity >= section.threshold])
    named = [[matrix.ids[place] for place in group] for group in sorted(groups)]
    return tuple(
        Cluster(
            id=f"cluster-{number}",
            members=tuple(members),
            representative=(len(members) > 1 and matrix.bases.get(members[0])) or _medoid(matrix, members),
            reason=_reason(matrix, members, section.threshold),
            notes=_notes(matrix, members),
        )
        for number, members in enumerate(named, start=1)
    )


def joins(matrix: SimilarityMatrix, section: ClusterSection) -> tuple[Join, ...]:
    """Return how groups of models join as the threshold falls, the most similar first: the dendrogram.

    The similarity of two groups is that of their most similar models, or for agglomerative clustering the mean over
    all their pairs. Groups with a pair that may not be merged, or has no similarity, never join.
    """
    import numpy as np

    matrix = _kept_apart(matrix, section)
    groups: list[tuple[int, ...]] = [(place,) for place in range(len(matrix.ids))]
    # nan where two groups must not meet; it stays nan whatever they join.
    between = np.array([[_similarity(matrix, a[0], b[0]) for b in groups] for a in groups], dtype=float)
    np.fill_diagonal(between, np.nan)
    found = []
    while not np.isnan(between).all():
        i, j = sorted(divmod(int(np.nanargmax(between)), len(groups)))
        found.append(Join(first=groups[i], second=groups[j], similarity=float(between[i, j])))
        if section.method == "agglomerative":
            sizes = len(groups[i]), len(groups[j])
            joined = (sizes[0] * between[i] + sizes[1] * between[j]) / sum(sizes)
        else:
            joined = np.maximum(between[i], between[j])
        between[i] = between[:, i] = joined
        between[i, i] = np.nan
        between = np.delete(np.delete(between, j, axis=0), j, axis=1)
        groups[i] += groups.pop(j)
    return tuple(found)


def suggest(matrix: SimilarityMatrix, section: ClusterSection) -> Suggestion:
    """Return the threshold in the widest gap between the similarities at which groups join, within 0..1."""
    found = joins(matrix, section)
    levels = sorted((join.similarity for join in found), reverse=True)
    if not levels:
        return Suggestion(threshold=None, clusters=len(matrix.ids))
    edges = [1.0, *levels, min(0.0, levels[-1])]
    gap, above, below = max((upper - lower, upper, lower) for upper, lower in pairwise(edges))
    threshold = below + gap / 2
    kept = [join for join in found if join.similarity >= threshold]
    return Suggestion(
        threshold=threshold, above=above, below=below if below in levels else None, clusters=len(_groups(matrix, kept))
    )


def _kept_apart(matrix: SimilarityMatrix, section: ClusterSection) -> SimilarityMatrix:
    """Return the matrix with a gate between each model that is to stay whole and all others."""
    if not section.apart:
        return matrix
    gates = {
        f"{one}|{other}": f"cluster.apart keeps {one} whole"
        for one in section.apart
        for other in matrix.ids
        if one != other and one in matrix.ids
    }
    return matrix.model_copy(update={"gates": {**matrix.gates, **gates}})


def _similarity(matrix: SimilarityMatrix, first: int, second: int) -> float | None:
    """Return the similarity of two models that may be merged, or None."""
    gate = matrix.gate(matrix.ids[first], matrix.ids[second])
    return matrix.values[first][second] if gate is None else None


def _groups(matrix: SimilarityMatrix, joined: list[Join]) -> list[list[int]]:
    home = {place: {place} for place in range(len(matrix.ids))}
    for join in joined:
        whole = set(join.first) | set(join.second)
        home.update(dict.fromkeys(whole, whole))
    return [sorted(group) for group in {id(group): group for group in home.values()}.values()]


def _leaders(matrix: SimilarityMatrix, threshold: float) -> list[list[int]]:
    groups: list[list[int]] = []
    for place in range(len(matrix.ids)):
        for group in groups:
            value = _similarity(matrix, group[0], place)
            apart = any(_similarity(matrix, member, place) is None for member in group)
            if value is not None and value >= threshold and not apart:
                group.append(place)
                break
        else:
            groups.append([place])
    return groups


def _medoid(matrix: SimilarityMatrix, members: list[str]) -> str:
    def total(name: str) -> float:
        return sum(matrix.between(name, other) or 0.0 for other in members)

    return max(members, key=total)


def _notes(matrix: SimilarityMatrix, members: list[str]) -> tuple[str, ...]:
    """Return what is to be known about pairs of members, the same note once for all of its models."""
    pairs: dict[str, set[str]] = {}
    for first, second in combinations(members, 2):
        note = matrix.note(first, second)
        if note is not None:
            pairs.setdefault(note, set()).update((first, second))
    return tuple(f"{_few([name for name in members if name in models])}: {note}" for note, models in pairs.items())


def _reason(matrix: SimilarityMatrix, members: list[str], threshold: float) -> str:
    if len(members) > 1:
        values = [matrix.between(a, b) or 0.0 for a in members for b in members if a != b]
        return f"same architecture, shapes and tokenizer; {matrix.signal} {min(values):.6f} to {max(values):.6f}"
    name = members[0]
    others = [other for other in matrix.ids if other != name]
    if not others:
        return "the only model of the zoo"
    comparable = [other for other in others if matrix.gate(name, other) is None]
    measured = [other for other in comparable if matrix.between(name, other) is not None]
    if measured:
        nearest = max(measured, key=lambda other: matrix.between(name, other) or -1.0)
        value = matrix.between(name, nearest) or 0.0
        place = "below" if value < threshold else "but the method keeps it out of that cluster at"
        return (
            f"its nearest neighbour, {nearest}, has {matrix.signal} {value:.4f}, {place} the threshold {threshold:.6g}"
        )
    if comparable:
        why = {matrix.why_undefined(name, other) or "nothing was measured" for other in comparable}
        return f"there is no {matrix.signal}: {'; '.join(sorted(why))}"
    gates: dict[str, list[str]] = {}
    for other in others:
        gates.setdefault(matrix.gate(name, other) or "", []).append(other)
    return f"no other model fits: {'; '.join(f'{gate}: {_few(names)}' for gate, names in gates.items())}"


def _few(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"
