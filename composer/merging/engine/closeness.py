"""How similar a candidate is to checkpoints, without writing it: measured as its blocks come."""

from collections.abc import Sequence
from math import sqrt

from composer.merging.engine.merge import Merge
from composer.merging.engine.shelf import Shelf
from composer.zoo import Checkpoint
from composer.zoo.kinds import kind_of


def closeness(merge: Merge, others: Sequence[Checkpoint], base: Checkpoint | None, shelf: Shelf) -> list[float]:
    """Return the cosine of a candidate with each of some checkpoints.

    The mean over tensors of attention and MLP, as in Model-GLUE (arXiv 2410.05357, section 3), of task vectors where
    there is a base to take them from: plain weights of one family are all alike.
    """
    sums: dict[str, list[tuple[float, float, float]]] = {}
    for name, start, block in merge.blocks():
        if kind_of(name) not in ("attention", "mlp"):
            continue
        stop = start + block.numel()
        origin = shelf.weights(base).flat(name)[start:stop].float() if base else 0.0
        ours = (block.float() - origin).double()
        found = sums.setdefault(name, [(0.0, 0.0, 0.0)] * len(others))
        for index, other in enumerate(others):
            theirs = (shelf.weights(other).flat(name)[start:stop].float() - origin).double()
            dot, first, second = found[index]
            found[index] = (
                dot + float(ours @ theirs),
                first + float(ours @ ours),
                second + float(theirs @ theirs),
            )
    means = []
    for index in range(len(others)):
        cosines = [
            dot / sqrt(first * second) for dot, first, second in (one[index] for one in sums.values()) if first * second
        ]
        means.append(sum(cosines) / len(cosines) if cosines else 0.0)
    return means
