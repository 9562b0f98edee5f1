"""Kernels of operators that know more of their inputs than the weights: statistics of the probe texts."""

from typing import TYPE_CHECKING

from composer.merging.engine.kernels import Compute, Group, part_of

if TYPE_CHECKING:
    import torch

RIDGE = 1e-6
"""Added to the diagonal of RegMean's inner products, relative to its mean: an input that is never active has none."""

TINY = 1e-30
"""Keeps a tensor that no input cares about from being divided by zero."""


def fisher(group: Group) -> Compute:
    """Fisher-weighted mean: ``sum(weight * F * input) / sum(weight * F)`` (arXiv 2111.09832, equation 4).

    A tensor that no gradient reaches is averaged by the weights alone.
    """
    import torch

    weights = group.numbers("weight")
    values = [one for one in group.statistics if one is not None]
    if len(values) < len(group.inputs):
        values = [torch.ones(1).expand(group.elements)] * len(group.inputs)
    floors = [
        group.number("floor") * group.memo.number(("fisher", group.name, name), one.mean) + TINY
        for name, one in zip(group.hashes[: len(values)], values, strict=True)
    ]

    def block(start: int, stop: int) -> "torch.Tensor":
        above, below = torch.zeros(stop - start), torch.zeros(stop - start)
        for tensor, one, floor, weight in zip(group.inputs, values, floors, weights, strict=True):
            importance = (one[start:stop] + floor).mul_(weight)
            above.addcmul_(tensor[start:stop].float(), importance)
            below.add_(importance)
        return above.div_(below)

    return block


def regmean(group: Group) -> Compute:
    """Closed-form merge of a linear layer `[out, in]` (arXiv 2212.09849, section 3.2).

    ``W = (sum W_i G_i) (sum G_i)^-1`` with ``G_i`` the inner products of the layer's inputs, what is off their
    diagonal times `alpha`. Tensors that are no linear layer are averaged.
    """
    import torch

    known = [one for one in group.statistics if one is not None]
    if len(known) < len(group.inputs):
        return lambda start, stop: torch.stack([one[start:stop].float() for one in group.inputs]).mean(dim=0)
    above = torch.zeros(group.shape, dtype=torch.float64)
    below = torch.zeros(group.shape[1], group.shape[1], dtype=torch.float64)
    for tensor, products in zip(group.inputs, known, strict=True):
        gram = products.double().reshape(below.shape)
        gram = group.number("alpha") * gram + (1 - group.number("alpha")) * torch.diag(gram.diagonal())
        above += tensor.reshape(group.shape).double() @ gram
        below += gram
    below.diagonal().add_(below.diagonal().mean() * RIDGE)
    return part_of(torch.linalg.solve(below, above.T).T)
