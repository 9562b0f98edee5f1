"""The arithmetic of merging one tensor.

A kernel takes a `Group`, all that goes into one output tensor, and returns what computes any block of the merged
tensor. What is not elementwise (a sort, a norm, a random mask) is computed by the kernel, tensor after tensor in
mergekit's order and with all threads, and remembered where it can be; blocks fit the processor's cache and are
computed by one thread each. The operations and their order are mergekit's, so that the result is mergekit's to the last
bit; where there is nothing to remember, the kernel is mergekit's own (`whole`).
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from composer.merging.engine.memo import Mask, Memo
from composer.merging.operators import Operator, Resolved

if TYPE_CHECKING:
    import torch

BLOCK = 1 << 18
"""Elements computed at a time; a multiple of 8, since masks are packed."""

SLERP_CHUNK = 1 << 20
"""Elements that mergekit takes a norm of at a time; part of the result, as sums of floats are."""
COLLINEAR = 0.9995
"""Cosine beyond which mergekit's slerp is linear."""


@dataclass(frozen=True)
class Group:
    """All that goes into one output tensor."""

    name: str
    operator: Operator
    shape: tuple[int, ...]
    """Of the output and of every input."""
    inputs: "tuple[torch.Tensor, ...]"
    """The inputs' tensors, flat, in their storage types."""
    base: "torch.Tensor | None"
    """The base's tensor, where the operator works on one."""
    values: Resolved
    """The operator's parameters as they apply to this tensor."""
    hashes: tuple[str, ...]
    """What each input, and lastly the base, is remembered by."""
    memo: Memo
    drawn: dict[Hashable, Mask]
    """The random masks of this merge, drawn so far."""
    statistics: "tuple[torch.Tensor | None, ...]" = ()
    """What the operator knows of each input besides its weights."""

    @property
    def elements(self) -> int:
        """Elements of the output."""
        return self.inputs[0].numel()

    def numbers(self, key: str) -> list[float]:
        """Return a parameter that has a value for each input."""
        return cast("list[float]", self.values[key])

    def number(self, key: str) -> float:
        """Return a parameter that has one value."""
        return cast("float", self.values[key])


Compute = Callable[[int, int], "torch.Tensor"]
"""Returns the elements of the merged tensor from `start` (a multiple of 8) to `stop`, flat, in float32."""

Kernel = Callable[[Group], Compute]


def linear(group: Group) -> Compute:
    """Weighted mean: ``sum(weight * input) / sum(weight)``."""
    import torch

    weights = torch.tensor([group.numbers("weight")])
    total = weights.sum(dim=1)

    def block(start: int, stop: int) -> "torch.Tensor":
        result = torch.zeros(stop - start)
        for tensor, weight in zip(group.inputs, weights.unbind(1), strict=True):
            result.addcmul_(tensor[start:stop].float(), weight)
        return result.div_(total) if group.values["normalize"] else result

    return block


def slerp(group: Group) -> Compute:
    """Spherical interpolation: ``(sin((1 - t) θ) a + sin(t θ) b) / sin θ``, linear where θ is small."""
    import torch

    first, second = group.inputs
    cosine = group.memo.number(("cosine", group.name, group.hashes), lambda: _cosine(first, second))
    t = torch.tensor([[group.number("t")]])
    straight = cosine.abs() > COLLINEAR
    theta = torch.acos(torch.where(straight, 0, cosine))
    a = torch.where(straight, 1 - t, torch.sin((1 - t) * theta) / torch.sin(theta))
    b = torch.where(straight, t, torch.sin(t * theta) / torch.sin(theta))

    def block(start: int, stop: int) -> "torch.Tensor":
        return (a * first[None, start:stop].float() + b * second[None, start:stop].float())[0]

    return block


def _cosine(first: "torch.Tensor", second: "torch.Tensor") -> "torch.Tensor":
    """Return the cosine of two flat tensors, `[1, 1]`, summed in mergekit's chunks."""
    import torch

    def chunks(tensor: "torch.Tensor") -> "list[torch.Tensor]":
        return [one.float()[None] for one in torch.split(tensor, SLERP_CHUNK)]

    def norm(tensor: "torch.Tensor") -> "torch.Tensor":
        parts = [torch.linalg.vector_norm(one, dim=1, keepdim=True) for one in chunks(tensor)]
        whole = torch.linalg.vector_norm(torch.stack(parts), dim=0)
        return torch.where(whole > 1e-8, whole, 1)

    norms = norm(first), norm(second)
    dots = [
        ((a / norms[0]) * (b / norms[1])).sum(dim=1, keepdim=True)
        for a, b in zip(chunks(first), chunks(second), strict=True)
    ]
    return torch.stack(dots).sum(dim=0).clamp(-1, 1)


def task_vectors(group: Group) -> Compute:
    """Base + lambda × combination of sparsified task vectors.

    The combination is the sum, or with elected signs (TIES, arXiv 2306.01708) the sum over the inputs whose change
    has the sign of the weighted majority; both divided by the weights that took part if `normalize` is set.
    """
    import torch
    from mergekit import merge_methods

    method = merge_methods.get(group.operator.method)
    origin = cast("torch.Tensor", group.base)
    masks = [_mask(group, method.sparsification_method, index) for index in range(len(group.inputs))]
    weights = torch.tensor(group.numbers("weight"))[:, None]
    total = weights.sum(dim=0)
    total[total.abs() < 1e-8] = 1
    scale = group.number("lambda")

    def block(start: int, stop: int) -> "torch.Tensor":
        base = origin[start:stop].float()
        deltas = torch.empty(len(group.inputs), stop - start)
        for row, tensor, mask in zip(deltas, group.inputs, masks, strict=True):
            torch.sub(tensor[start:stop].float(), base, out=row)
            if mask is not None:
                mask.apply(row, start)
        deltas.mul_(weights)
        divisor = total
        if method.consensus_method:
            majority = (deltas.sum(dim=0) >= 0).to(deltas.dtype) * 2 - 1
            agree = deltas.sign() == majority
            deltas.mul_(agree)
            if group.values["normalize"]:
                divisor = (weights * agree).sum(dim=0)
                divisor[divisor == 0] = 1
        mixed = deltas.sum(dim=0)
        if group.values["normalize"]:
            mixed /= divisor
        if scale != 1:
            mixed *= scale
        return base.add_(mixed)

    return block


def _mask(group: Group, method: Any, index: int) -> Mask | None:
    """Return which elements of an input's task vector are kept, or None for all."""
    if method is None or group.numbers("density")[index] >= 1:
        return None
    settings: dict[str, float] = {
        key: group.numbers(key)[index] for key in ("density", "gamma", "epsilon") if key in group.values
    }
    rescale = bool(group.values["rescale"])
    if group.operator.random:
        if (group.name, index) not in group.drawn:
            group.drawn[group.name, index] = _sparsify(group, method, index, settings, rescale)
        return group.drawn[group.name, index]
    key = (group.name, group.hashes[index], group.hashes[-1], method, tuple(settings.items()), rescale)
    return group.memo.mask(key, lambda: _sparsify(group, method, index, settings, rescale))


def _sparsify(group: Group, method: Any, index: int, settings: dict[str, float], rescale: bool) -> Mask:
    """Let mergekit choose what is kept (its sort breaks ties in an order of its own), and remember the choice.

    Where the task vector is zero it does not matter whether it is kept.
    """
    import numpy as np
    import torch
    from mergekit.sparsify import sparsify

    delta = (group.inputs[index].float() - cast("torch.Tensor", group.base).float()).reshape(group.shape)
    kept = sparsify(delta, method=method, rescale_norm=None, **settings)
    scale = None
    if rescale:
        before, after = delta.abs().sum(), kept.abs().sum()
        scale = before / after if before >= 1e-7 and after >= 1e-7 else None
    return Mask(torch.from_numpy(np.packbits((kept != 0).flatten().numpy())), scale)


def whole(group: Group) -> Compute:
    """Merge the whole tensor at once with mergekit's own method."""
    from mergekit import merge_methods
    from mergekit.merge_methods import merge_tensors

    method = merge_methods.get(group.operator.method)
    tensors = [one.float().reshape(group.shape) for one in group.inputs]
    base = 0 if group.operator.start == "first" else None
    if group.base is not None:
        base = len(tensors)
        tensors.append(group.base.float().reshape(group.shape))
    parameters = {}
    for spec in method.spec.parameters:
        if spec.name in group.values:
            value = group.values[spec.name]
            parameters[spec.name] = dict(enumerate(value)) if isinstance(value, list) else spec.validate(value)
    merged = merge_tensors(tensors, method, parameters=parameters, base_index=base, name=group.name)
    return part_of(merged)


def copy(group: Group) -> Compute:
    """Take the one input as it is."""
    return part_of(group.inputs[0])


def part_of(tensor: "torch.Tensor") -> Compute:
    """Return what gives parts of a tensor that is there."""
    flat = tensor.reshape(-1)
    return lambda start, stop: flat[start:stop].float()
