"""All pairs of a group of models in one pass over their weights.

Each tensor of each model is read once, a block of rows at a time, and only inner products are kept: reads grow
with the number of models, not with that of pairs, and memory with the block, not with the models. What is known of
a pair already, by content hash, is not computed again.
"""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import combinations, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer.errors import ZooError
from composer.progress import Progress, Step
from composer.similarity.moments import Moments, MomentsCache
from composer.zoo import Checkpoint, TensorHeader, Weights, open_weights
from composer.zoo.kinds import is_vocabulary
from composer.zoo.tokenizers import vocabulary

if TYPE_CHECKING:
    import torch

BLOCK_ELEMENTS = 1 << 21
"""Elements held of all models together by each worker."""
MOST_WORKERS = 8
"""Tensors read at the same time, at most; each holds its own blocks."""
RUN = 512
"""Products added up in float32 before the sum is carried on in float64: keeps the error of a cosine below 1e-6."""


@dataclass
class Pass:
    """What a pass found."""

    read_bytes: int = 0
    broken: dict[str, str] = field(default_factory=dict)
    """Models that cannot be used, by id, with the reason."""


def measure(
    group: list[Checkpoint],
    base: Checkpoint | None,
    cache: MomentsCache,
    *,
    columns: bool,
    progress: Progress,
) -> Pass:
    """Make sure that the moments of all pairs of a group are in the cache.

    Args:
        group: Models whose tensors have the same names and shapes, up to rows of vocabulary.
        base: The model that task vectors start from, if it is known and of the same shapes; moments of task vectors
            are then taken in the same pass.
        cache: Where moments are looked up and kept.
        columns: Whether the cosines of single columns are wanted too.
        progress: Told of the bytes read.
    """
    models = [*group, *([base] if base is not None and base.id not in [one.id for one in group] else [])]
    found = Pass()
    while True:
        missing = _missing(models, base, cache, columns)
        fresh = _cover(models, missing, cache)
        if not fresh:
            return found
        # Models with something to measure stand first; the others only lend their weights.
        lent = {name for pair in missing for name in pair} | ({base.id} if base is not None and missing else set())
        others = [one for one in models if one.id in lent and one not in fresh]
        try:
            reader = _Reader([*fresh, *others], len(fresh), base, columns)
            reader.run(found, progress)
        except _BrokenError as error:  # a file cannot be read: the others start again without it
            found.broken[error.model] = error.reason
        else:
            reader.save(cache, missing, found.broken)
        models = [one for one in models if one.id not in found.broken]
        if base is not None and base.id in found.broken:
            base = None


class _BrokenError(Exception):
    def __init__(self, model: str, reason: str) -> None:
        super().__init__(reason)
        self.model, self.reason = model, reason


def _missing(
    models: list[Checkpoint], base: Checkpoint | None, cache: MomentsCache, columns: bool
) -> set[frozenset[str]]:
    """Return the pairs that are not in the cache yet, by ids."""
    missing = set()
    for first, second in combinations(models, 2):
        needed = [None] if base is None or base.id in (first.id, second.id) else [None, base.content_hash]
        hashes = first.content_hash, second.content_hash
        if not all(cache.has(*hashes, one, columns=columns) for one in needed):
            missing.add(frozenset((first.id, second.id)))
    return missing


def _cover(models: list[Checkpoint], missing: set[frozenset[str]], cache: MomentsCache) -> list[Checkpoint]:
    """Return few models such that every missing pair has one of them, and those whose weights were never read."""
    chosen = {one.id for one in models if not cache.is_finite(one.content_hash)}
    left = [pair for pair in missing if not pair & chosen]
    while left:
        counts = Counter(name for pair in left for name in sorted(pair))
        name = max(sorted(counts), key=lambda one: counts[one])
        chosen.add(name)
        left = [pair for pair in left if name not in pair]
    return [one for one in models if one.id in chosen]


@dataclass
class _Sums:
    """Sums over the elements of each tensor, `[tensors, fresh, models]`, or of one, `[fresh, models]`, in float64."""

    dots: "torch.Tensor"
    first_squares: "torch.Tensor"
    second_squares: "torch.Tensor"
    opposite_signs: "torch.Tensor"
    both_nonzero: "torch.Tensor"
    column_cosines: "torch.Tensor"
    """Mean cosine of a matrix's columns; nan where it was not asked for or there is none."""

    @classmethod
    def zeros(cls, tensors: int, fresh: int, models: int) -> "_Sums":
        """Return sums of nothing for all tensors, in memory of their own.

        Small pieces among the blocks that come and go would keep the allocator from using that memory again.
        """
        import torch

        tables = {one.name: torch.zeros(tensors, fresh, models, dtype=torch.float64) for one in fields(cls)}
        tables["column_cosines"].fill_(float("nan"))
        return cls(**tables)

    def __getitem__(self, place: int) -> "_Sums":
        """Return the sums of one tensor; what is added to them is added here."""
        return _Sums(*(getattr(self, one.name)[place] for one in fields(self)))

    def add(self, block: "torch.Tensor", mask: "_Mask | None" = None) -> None:
        """Add a block, `[models, elements, padded with zeros to whole runs]`."""
        import torch

        fresh, models = self.dots.shape
        dots = _gram(block, fresh)
        squares = dots.diagonal() if fresh == models else _squares(block)
        if block.dtype == torch.float32 and not _in_range(block, squares):
            block = block.double()
            dots, squares = _gram(block, fresh), _squares(block)
        self.dots += dots
        if mask is None:
            self.first_squares += squares[:fresh, None]
            self.second_squares += squares
        else:
            own = mask.row_squares(block)
            self.first_squares += own[:fresh] @ mask.present.T
            self.second_squares += mask.present[:fresh] @ own.T
        opposite, both = _sign_counts(block, fresh)
        self.opposite_signs += opposite
        self.both_nonzero += both


def _sign_counts(block: "torch.Tensor", fresh: int) -> "tuple[torch.Tensor, torch.Tensor]":
    """Return, `[fresh, models]`, how many elements have opposite signs, and how many are zero in neither.

    One bit an element, so that a pair costs an exclusive or and a count of bits.
    """
    import numpy as np
    import torch

    values = block.numpy()
    negative, nonzero = (np.packbits(bits, axis=1).view(np.uint64) for bits in (values < 0, values != 0))
    opposite = np.empty((fresh, len(values)))
    both = np.empty_like(opposite)
    alike = bool((nonzero == nonzero[0]).all())  # as where nothing is zero: then there is one count for all pairs
    for place in range(fresh):
        differing = negative[place] ^ negative
        if not alike:
            shared = nonzero[place] & nonzero
            both[place] = np.bitwise_count(shared).sum(axis=1, dtype=np.int64)
            differing &= shared
        opposite[place] = np.bitwise_count(differing).sum(axis=1, dtype=np.int64)
    if alike:
        both[:] = np.bitwise_count(nonzero[0]).sum(dtype=np.int64)
    return torch.from_numpy(opposite), torch.from_numpy(both)


@dataclass
class _Mask:
    """Which tokens of a block of rows each model has."""

    present: "torch.Tensor"
    """`[models, tokens]`, 1 or 0, in float64."""
    width: int
    """Elements in a row."""

    def row_squares(self, block: "torch.Tensor") -> "torch.Tensor":
        """Return the squared norm of each row, `[models, tokens]`."""
        models, tokens = self.present.shape
        rows = block[:, : tokens * self.width].reshape(models, tokens, self.width).double()
        return rows.square().sum(dim=2)


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Yield a pool of threads that compute with one thread each.

    Small operations waste a third of their time in waiting for each other's threads; whole tensors in parallel do
    not, and the reading of one overlaps with the arithmetic of another.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(min(threads, MOST_WORKERS), initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C, what has not begun never does
        torch.set_num_threads(threads)


def _whole_runs(elements: int) -> int:
    return -(-elements // RUN) * RUN


def _gram(block: "torch.Tensor", fresh: int) -> "torch.Tensor":
    """Return inner products of the first `fresh` rows with all, in runs of `RUN` elements."""
    import torch

    runs = block.view(len(block), -1, RUN).transpose(0, 1)
    return torch.bmm(runs[:, :fresh], runs.transpose(1, 2)).sum(dim=0, dtype=torch.float64)


def _squares(block: "torch.Tensor") -> "torch.Tensor":
    import torch

    runs = block.view(len(block), -1, RUN)
    squares: torch.Tensor = torch.linalg.vecdot(runs, runs)
    return squares.sum(dim=1, dtype=torch.float64)


def _in_range(block: "torch.Tensor", squares: "torch.Tensor") -> bool:
    """Return whether sums of squares in float32 neither overflowed nor lost small numbers."""
    usual = (squares > 1e-24) & (squares < 1e32)
    if bool(usual.all()):
        return True
    odd = (~usual).nonzero().flatten()
    return all(bool(squares[index] == 0) and not bool(block[index].any()) for index in odd)


class _Reader:
    """One pass over a group of models, of which the first `fresh` have pairs to be measured."""

    def __init__(self, models: list[Checkpoint], fresh: int, base: Checkpoint | None, columns: bool) -> None:
        self.models, self.fresh, self.columns = models, fresh, columns
        self.base = next((index for index, one in enumerate(models) if base is not None and one.id == base.id), None)
        self.base_hash = base.content_hash if base is not None else None
        self.weights = [self._open(one) for one in models]
        headers = [one.headers for one in self.weights]
        self.names = [name for name in headers[0] if all(one[name].floating for one in headers)]
        self.sums = _Sums.zeros(len(self.names), fresh, len(models))
        self.delta_sums = _Sums.zeros(len(self.names), fresh, len(models)) if self.base is not None else None

    def run(self, found: Pass, progress: Progress) -> None:
        """Read everything once and fill the sums; models that are not finite go to `found.broken`."""
        total = sum(one.headers[name].nbytes for one in self.weights for name in self.names)
        with _workers() as pool:
            for place, _ in enumerate(pool.map(self._tensor, range(len(self.names)))):
                name = self.names[place]
                found.read_bytes += sum(one.headers[name].nbytes for one in self.weights)
                progress(Step(stage="compare", message=name, done=found.read_bytes, total=total))
                self._find_broken(place, found)

    def save(self, cache: MomentsCache, missing: set[frozenset[str]], broken: dict[str, str]) -> None:
        """Keep the moments of the pairs that were missing."""
        sound = [index for index, one in enumerate(self.models) if one.id not in broken]
        for index in sound:
            cache.mark_finite(self.models[index].content_hash)
        deltas = self.delta_sums if self.base in sound else None
        for i, j in combinations(sound, 2):  # the first is a fresh one, since those stand first
            first, second = self.models[i], self.models[j]
            if frozenset((first.id, second.id)) in missing:
                hashes = first.content_hash, second.content_hash
                cache.save(*hashes, None, self._moments(self.sums, i, j))
                if deltas is not None and self.base not in (i, j):
                    cache.save(*hashes, self.base_hash, self._moments(deltas, i, j))

    def _moments(self, sums: _Sums, i: int, j: int) -> Moments:
        def values(table: "torch.Tensor") -> Any:
            return tuple(table[:, i, j].tolist())

        cosines = (None if value != value else value for value in values(sums.column_cosines))
        return Moments(
            names=tuple(self.names),
            dots=values(sums.dots),
            first_squares=values(sums.first_squares),
            second_squares=values(sums.second_squares),
            same_signs=values((sums.both_nonzero - sums.opposite_signs).long()),
            both_nonzero=values(sums.both_nonzero.long()),
            column_cosines=tuple(cosines) if self.columns else None,
        )

    def _open(self, one: Checkpoint) -> Weights:
        try:
            return open_weights(one.source, Path(one.home))
        except ZooError as error:
            raise _BrokenError(one.id, str(error)) from None

    def _tensor(self, place: int) -> None:
        """Read one tensor of all models and fill its sums."""
        import torch

        name = self.names[place]
        headers = [one.headers[name] for one in self.weights]
        count = len(self.models)
        sums = self.sums[place]
        deltas = self.delta_sums[place] if self.delta_sums is not None else None
        dtype = torch.float64 if any(header.dtype == "F64" for header in headers) else torch.float32
        width = headers[0].row_elements
        matrix = len(headers[0].shape) == 2 and self.columns
        columns = _Columns(self.fresh, count, width) if matrix else None
        delta_columns = _Columns(self.fresh, count, width) if matrix and self.base is not None else None
        step = max(1, BLOCK_ELEMENTS // count // max(1, width))
        aligned = is_vocabulary(name) and self._rows_differ(headers)
        rows = int(self._places.shape[1]) if aligned else headers[0].rows
        buffer = torch.empty(count * _whole_runs(min(step, rows) * width), dtype=dtype)
        for parts, present in self._aligned(name, step) if aligned else self._blocks(name, rows, step):
            length = parts[0].numel()
            block = buffer[: count * _whole_runs(length)].view(count, -1)
            block[:, length:] = 0
            for index, part in enumerate(parts):
                block[index, :length] = part.reshape(-1)
            mask = None if present is None else _Mask(present, width)
            centred = self._centred(block, mask) if deltas is not None else None
            if columns is not None:
                columns.add(block[:, :length].view(count, -1, width))
            if delta_columns is not None and centred is not None:
                delta_columns.add(centred[:, :length].view(count, -1, width))
            sums.add(block, mask)
            if deltas is not None and centred is not None:
                deltas.add(centred, mask)
        if columns is not None:
            sums.column_cosines.copy_(columns.cosines())
        if deltas is not None and delta_columns is not None:
            deltas.column_cosines.copy_(delta_columns.cosines())

    def _centred(self, block: "torch.Tensor", mask: _Mask | None) -> "torch.Tensor":
        """Return task vectors: the block less the base; zero where a token is not in both."""
        centred = block - block[self.base]
        if mask is not None:
            both = (mask.present * mask.present[self.base]).repeat_interleave(mask.width, dim=1)
            centred[:, : both.shape[1]] *= both.to(centred.dtype)
        return centred

    def _find_broken(self, place: int, found: Pass) -> None:
        """List the models whose tensor holds NaN or infinity.

        A sum of squares in float64 is finite exactly when every element is: it has room for those of any float32.
        """
        finite = self.sums.second_squares[place].isfinite().all(dim=0)
        for index, one in enumerate(self.models):
            if not finite[index] and one.id not in found.broken:
                file = self.weights[index].headers[self.names[place]].file
                found.broken[one.id] = f"{file}: tensor {self.names[place]} holds NaN or infinite values"

    def _blocks(self, name: str, rows: int, step: int) -> Iterator[tuple[list["torch.Tensor"], None]]:
        """Yield the same rows of all models."""
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            yield [self._read(index, name, start, stop) for index in range(len(self.models))], None

    def _aligned(self, name: str, step: int) -> Iterator[tuple[list["torch.Tensor"], "torch.Tensor"]]:
        """Yield the rows of the same tokens of all models, and which models have each; zeros where one has not."""
        for start in range(0, self._places.shape[1], step):
            block = self._places[:, start : start + step].clone()
            parts = []
            for index, one in enumerate(self.weights):
                block[index][block[index] >= one.headers[name].rows] = -1
                parts.append(self._gather(index, name, block[index]))
            yield parts, (block >= 0).double()

    def _gather(self, index: int, name: str, rows: "torch.Tensor") -> "torch.Tensor":
        """Return the given rows of a tensor, zeros for -1; neighbours are read together."""
        import torch

        header = self.weights[index].headers[name]
        out = torch.zeros(len(rows), *header.shape[1:], dtype=torch.float64 if header.dtype == "F64" else torch.float32)
        breaks = (rows[1:] != rows[:-1] + 1).nonzero().flatten() + 1
        edges = [0, *breaks.tolist(), len(rows)]
        for start, stop in pairwise(edges):
            first = int(rows[start])
            if first >= 0:
                out[start:stop] = self._read(index, name, first, first + stop - start).to(out.dtype)
        return out

    def _read(self, index: int, name: str, start: int, stop: int) -> "torch.Tensor":
        try:
            return self.weights[index].read(name, start, stop)
        except ZooError as error:
            raise _BrokenError(self.models[index].id, str(error)) from None

    def _rows_differ(self, headers: list[TensorHeader]) -> bool:
        """Return whether a row stands for another token in another model."""
        tokens = {(one.tokenizer.vocabulary, one.tokenizer.added_tokens) for one in self.models}
        return len(tokens) > 1 or len({header.rows for header in headers}) > 1

    @cached_property
    def _places(self) -> "torch.Tensor":
        """The row of every token of any model in every model, `[models, tokens]`; -1 where it has none."""
        import torch

        tables = [vocabulary(Path(one.tokenizer_home)) for one in self.models]
        tokens: dict[str, int] = {}
        for table in tables:
            for token, _ in sorted(table.items(), key=lambda item: item[1]):
                tokens.setdefault(token, len(tokens))
        places = torch.full((len(tables), len(tokens)), -1, dtype=torch.long)
        for index, table in enumerate(tables):
            places[index, [tokens[token] for token in table]] = torch.tensor(list(table.values()))
        return places


class _Columns:
    """Cosines of the columns of one matrix, `[out, in]`."""

    def __init__(self, fresh: int, models: int, width: int) -> None:
        import torch

        self.dots = torch.zeros(fresh, models, width, dtype=torch.float64)
        self.squares = torch.zeros(models, width, dtype=torch.float64)

    def add(self, rows: "torch.Tensor") -> None:
        """Add rows of all models, `[models, rows, columns]`."""
        import torch

        fresh = len(self.dots)
        for start in range(0, rows.shape[1], RUN):
            part = rows[:, start : start + RUN]
            self.squares += part.square().sum(dim=1)
            products = torch.empty_like(part)
            for place in range(fresh):  # pairs of fresh models once, each with all others
                torch.mul(part[place:], part[place], out=products[place:])
                sums = products[place:].sum(dim=1)
                self.dots[place, place:] += sums
                self.dots[place + 1 :, place] += sums[1 : fresh - place]

    def cosines(self) -> "torch.Tensor":
        """Return the mean over columns, `[fresh, models]`; columns that are zero in one of the two do not count."""
        norms = self.squares.sqrt()
        scale = norms[: len(self.dots), None] * norms
        counted = scale > 0
        cosines = (self.dots / scale.where(counted, scale.new_ones(()))).clamp(-1, 1) * counted
        return cosines.sum(dim=2) / counted.sum(dim=2)  # nan where no column counts
