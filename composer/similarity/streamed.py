"""Similarity of all pairs in one pass over the weights."""

from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from composer.errors import ZooError
from composer.progress import Progress, Step, silent
from composer.similarity.gate import difference
from composer.similarity.matrix import SimilarityMatrix
from composer.zoo import Checkpoint, TensorHeader, Zoo, read_headers, read_rows

if TYPE_CHECKING:
    import torch

BLOCK_ELEMENTS = 1 << 20
"""Elements of one model held at a time: memory is `models x BLOCK_ELEMENTS`, whatever the models' size."""


def compare(zoo: Zoo, progress: Progress = silent) -> SimilarityMatrix:
    """Measure the cosine of every pair of models of equal shape, reading each tensor of each model once.

    The similarity of two models is the mean, over their attention and MLP matrices, of the cosine of the
    flattened matrices (Model-GLUE, arXiv 2410.05357, section 3; there per input column). Embeddings, norms
    and the output head are checked for non-finite values but do not count.

    Raises:
        ZooError: if a tensor holds NaN or infinity, naming model, file and tensor.
    """
    import torch

    members = zoo.members
    gates = {f"{a.id}|{b.id}": reason for a, b in combinations(members, 2) if (reason := difference(a, b)) is not None}
    headers = {member.id: read_headers(Path(member.path)) for member in members}
    total = sum(header.nbytes for one in headers.values() for header in one.values())
    values: dict[tuple[str, str], float] = {}
    done = 0
    for group in _groups(members, gates):
        sums = torch.zeros(len(group), len(group), dtype=torch.float64)
        count = 0
        for name in headers[group[0].id]:
            gram = _gram(group, headers, name)
            done += sum(headers[member.id][name].nbytes for member in group)
            progress(Step(stage="compare", message=name, done=done, total=total))
            if _counts(name, headers[group[0].id][name]):
                norms = gram.diagonal().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
                sums += gram / torch.outer(norms, norms)
                count += 1
        for i, a in enumerate(group):
            for j, b in enumerate(group):
                values[a.id, b.id] = float(sums[i, j] / count) if count else float(i == j)
    if zoo.base is not None and zoo.base.id not in zoo.ids:
        alone = {zoo.base.id: read_headers(Path(zoo.base.path))}
        for name in alone[zoo.base.id]:
            _gram([zoo.base], alone, name)
    ids = zoo.ids
    rows = tuple(tuple(1.0 if a == b else values.get((a, b)) for b in ids) for a in ids)
    return SimilarityMatrix(ids=ids, values=rows, gates=gates)


def _groups(members: tuple[Checkpoint, ...], gates: dict[str, str]) -> list[list[Checkpoint]]:
    """Split the zoo into groups in which every pair passes the gate."""
    groups: list[list[Checkpoint]] = []
    for member in members:
        for group in groups:
            if f"{group[0].id}|{member.id}" not in gates:
                group.append(member)
                break
        else:
            groups.append([member])
    return groups


def _gram(group: list[Checkpoint], headers: dict[str, dict[str, TensorHeader]], name: str) -> "torch.Tensor":
    """Return the inner products of one tensor of all models of a group, `[models, models]` in float64."""
    import torch

    gram = torch.zeros(len(group), len(group), dtype=torch.float64)
    streams = [read_rows(headers[member.id], name, BLOCK_ELEMENTS) for member in group]
    for blocks in zip(*streams, strict=True):
        matrix = torch.stack([block.reshape(-1).to(torch.float64) for block in blocks])
        gram += matrix @ matrix.T
    for index, member in enumerate(group):
        # A sum of squares is finite exactly when every element is (float64 has room for any float32).
        if not torch.isfinite(gram[index, index]):
            file = headers[member.id][name].file
            raise ZooError(f"model '{member.id}': {file}: tensor {name} holds NaN or infinite values")
    return gram


def _counts(name: str, header: TensorHeader) -> bool:
    """Return whether a tensor is a matrix of an attention or MLP block."""
    embedding = any(part in name for part in ("embed", "lm_head", "wte", "wpe"))
    return len(header.shape) >= 2 and not embedding
