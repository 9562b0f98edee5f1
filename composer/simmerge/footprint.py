"""What an operator makes of some models, told from a sample of their tensors: its footprint.

Whatever an operator does (sorting, drawing, rotating), its result is a point in weight space: so much of each source's
difference from the origin, and something outside their span. These few numbers are what a predictor sees of an
operator, so one that was never trained on is predicted by what it does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from composer.errors import MergeError
from composer.merging.engine.kernels import Group
from composer.merging.engine.memo import Memo
from composer.merging.operators import OPERATORS, Resolved, values_at
from composer.zoo import Checkpoint, MappedWeights
from composer.zoo.kinds import kind_of, layer_of

if TYPE_CHECKING:
    import torch

    from composer.simmerge.signals import Array

TENSORS = 6
"""Tensors of the sample."""
ELEMENTS = 1 << 15
"""Elements of each, at most: its first rows."""
DIRECTIONS = 4
"""Singular directions that two models' differences are compared in."""


@dataclass(frozen=True)
class Sample:
    """A few rows of a few tensors of each model."""

    models: "tuple[tuple[torch.Tensor, ...], ...]"
    """By model, the tensors `[rows, columns]`."""
    base: "tuple[torch.Tensor, ...] | None"
    memo: Memo = field(default_factory=Memo)
    """What operators remember of each model's rows."""


def take_sample(models: Sequence[Checkpoint], base: Checkpoint | None) -> Sample:
    """Read the first rows of an attention and an MLP matrix in each third of the depth.

    Raises:
        MergeError: if the models have no such matrices.
    """
    weights = [MappedWeights(Path(one.path)) for one in (*models, *([base] if base else []))]
    names = _chosen(weights[0], models[0].layers or 1)
    if not names:
        raise MergeError(f"'{models[0].id}' has no attention or MLP matrices to look at")

    def rows(one: MappedWeights) -> "tuple[torch.Tensor, ...]":
        found = []
        for name in names:
            columns = one.headers[name].shape[1]
            count = max(1, min(one.headers[name].shape[0], ELEMENTS // columns))
            found.append(one.flat(name)[: count * columns].reshape(count, columns).clone())
            one.release(name)
        return tuple(found)

    parts = [rows(one) for one in weights]
    return Sample(tuple(parts[: len(models)]), parts[-1] if base else None)


def _chosen(weights: MappedWeights, layers: int) -> list[str]:
    chosen: dict[tuple[str, int], str] = {}
    for name, header in sorted(weights.headers.items()):
        layer, kind = layer_of(name), kind_of(name)
        if layer is not None and kind in ("attention", "mlp") and len(header.shape) == 2 and header.floating:
            chosen.setdefault((kind, min(2, 3 * layer // layers)), name)
    return [chosen[key] for key in sorted(chosen)][:TENSORS]


def spectra(sample: Sample) -> "tuple[Array, Array]":
    """Return how few directions each model's differences from the origin lie in, and how many they share.

    Returns:
        `[models]`: share of the squared length in the `DIRECTIONS` strongest directions of each matrix's inputs, and
        `[models, models]`: overlap of these directions, the squared cosines of the angles between them, 0..1; means
        over the sample's matrices.
    """
    import torch

    count = len(sample.models)
    energy, overlap = np.zeros(count), np.zeros((count, count))
    places = range(len(sample.models[0]))
    for place in places:
        matrices = torch.stack([one[place].double() for one in sample.models])
        origin = sample.base[place].double() if sample.base is not None else matrices.mean(dim=0)
        _, lengths, directions = torch.linalg.svd(matrices - origin, full_matrices=False)
        squares = lengths.square()
        energy += (squares[:, :DIRECTIONS].sum(dim=1) / squares.sum(dim=1).clamp_min(1e-300)).numpy()
        strong = directions[:, :DIRECTIONS]
        overlap += torch.einsum("aic,bjc->abij", strong, strong).square().sum(dim=(2, 3)).numpy() / strong.shape[1]
    return energy / len(places), overlap / len(places)


def footprint(
    operator: str,
    parameters: dict[str, "float | bool | list[float | list[float]]"],
    sources: Sequence[int],
    sample: Sample,
    *,
    seed: int = 0,
) -> tuple["Array", float]:
    """Return a merge's effective coefficients, one per source, and what it has outside their span.

    Args:
        operator: The operator's name.
        parameters: Its parameters; what is missing takes its default.
        sources: The inputs, in order, as numbers of the sample's models.
        sample: Of all models.
        seed: Of random masks.

    Returns:
        Least-squares coefficients of the differences from the base (from the sources' mean, without one, where they
        add up to 1), and the length of the rest over that of the whole change.

    Raises:
        MergeError: if the operator does not take these inputs, or fails on them.
    """
    import torch

    one = OPERATORS.get(operator)
    values = one.resolve(operator, len(sources), parameters)
    if one.statistics:
        raise MergeError(f"operator '{operator}' goes by statistics that a sample has not")
    if one.start == "base" and sample.base is None:
        raise MergeError(f"operator '{operator}' works on task vectors; set zoo.base in the recipe")
    resolved: Resolved = values_at(one, values, 0, 1, len(sources))
    count = len(sources)
    gram, dots, whole = np.zeros((count, count)), np.zeros(count), 0.0
    wants_base = one.start == "base" or bool(values.get("from_base"))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for place in range(len(sample.models[0])):
            inputs = [sample.models[source][place] for source in sources]
            base = sample.base[place] if sample.base is not None else None
            group = Group(
                name=str(place),
                operator=one,
                shape=tuple(inputs[0].shape),
                inputs=tuple(tensor.reshape(-1) for tensor in inputs),
                base=base.reshape(-1) if base is not None and wants_base else None,
                values=resolved,
                hashes=(*map(str, sources), "base"),
                memo=sample.memo,
                drawn={},
            )
            try:
                merged = one.load()(group)(0, inputs[0].numel()).double().reshape(-1)
            except (RuntimeError, ValueError, TypeError) as error:
                raise MergeError(f"operator '{operator}' fails on a sample: {error}") from error
            flat = torch.stack([tensor.reshape(-1).double() for tensor in inputs])
            origin = base.reshape(-1).double() if base is not None else flat.mean(dim=0)
            differences, change = flat - origin, merged - origin
            gram += (differences @ differences.T).numpy()
            dots += (differences @ change).numpy()
            whole += float(change @ change)
    return _solve(gram, dots, whole, affine=sample.base is None)


def _solve(gram: "Array", dots: "Array", whole: float, *, affine: bool) -> tuple["Array", float]:
    """Return least-squares coefficients and the length of the rest."""
    count = len(dots)
    if not np.isfinite(gram).all() or not np.isfinite(dots).all():
        return np.full(count, np.nan), float("nan")
    ridge = 1e-9 * max(float(np.trace(gram)) / count, 1e-300)
    if affine:  # the differences add up to nothing, so one more condition makes them one: coefficients add up to 1
        found, *_ = np.linalg.lstsq(
            np.vstack([gram, np.full(count, np.sqrt(max(float(np.trace(gram)), 1e-300)))]),
            np.append(dots, np.sqrt(max(float(np.trace(gram)), 1e-300))),
            rcond=None,
        )
    else:
        found = np.linalg.solve(gram + ridge * np.eye(count), dots)
    explained = float(2 * found @ dots - found @ gram @ found)
    rest = max(whole - explained, 0.0)
    return found, float(np.sqrt(rest / whole)) if whole > 0 else 0.0
