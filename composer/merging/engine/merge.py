"""One merge: a step bound to its inputs, computed tensor by tensor in the order in which mergekit would.

The same blocks go into the parameters of a live model (`live.py`) and into files (`export.py`), so what is kept is
what was scored.
"""

import math
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, cast

from composer.artefacts import digest
from composer.errors import MergeError, first_line
from composer.merging.engine.kernels import BLOCK, Group
from composer.merging.engine.memo import Mask
from composer.merging.engine.shelf import Shelf
from composer.merging.operators import OPERATORS, Operator, group_count, group_of, values_at
from composer.merging.plan import MergeStep
from composer.zoo import Checkpoint, Lineage, TensorHeader
from composer.zoo.kinds import in_layer, is_input_embedding, layer_of
from composer.zoo.weights import TORCH_DTYPES

if TYPE_CHECKING:
    import torch

_STORED = {TORCH_DTYPES[kind]: kind for kind in ("BF16", "F16", "F32")}
"""Types that merges are stored in, as safetensors names them."""

WORKERS = 16
"""Threads that compute at most: merging is bound by memory, which a few of them use up."""
AHEAD = 4
"""Blocks that may wait for each thread."""


@dataclass(frozen=True)
class Slot:
    """One tensor of the result."""

    header: TensorHeader
    """Its shape and storage type."""
    sources: tuple[tuple[int, str], ...]
    """What it is made of: numbers of inputs, and the tensor's name in each."""


class Merge:
    """A step bound to its inputs.

    Attributes:
        step: The operator and its parameters.
        inputs: The checkpoints, in the step's order.
        donor: The checkpoint whose configuration and tokenizer the result has.
        slots: The result's tensors by name, in the order they are computed.
        lineage: How the result came about.
        vocabulary: How differing vocabularies are brought together, or None if they are the same.
    """

    def __init__(
        self,
        step: MergeStep,
        inputs: Sequence[Checkpoint],
        base: Checkpoint | None,
        shelf: Shelf,
        *,
        dtype: str | None = None,
        seed: int = 0,
        tokenizer: str = "union",
        texts: str | None = None,
    ) -> None:
        """Bind a step; nothing is computed.

        Args:
            step: The operator and its parameters.
            inputs: The checkpoints, in the step's order.
            base: The checkpoint they were fine-tuned from, for operators on task vectors.
            shelf: What merges share.
            dtype: Storage type of the result; by default that of the first input.
            seed: Seed of random masks.
            tokenizer: "union" or "base": the tokens of the result, where the inputs' differ.
            texts: Hash of the probe texts, for operators that go by statistics of them.

        Raises:
            MergeError: if the operator does not fit the inputs.
        """
        self.step, self.inputs, self.shelf, self.seed = step, list(inputs), shelf, seed
        self.operator: Operator = OPERATORS.get(step.operator)
        self.lineage = lineage_of(step, inputs, base, seed, texts)
        self.values = self.lineage.parameters
        self.base = base if self.lineage.base else None
        self.donor = self.base or self.inputs[0]
        self.groups = group_count(self.values, self.operator)
        if self.groups - 1 > (self.donor.layers or 1):
            raise MergeError(
                f"merge '{step.name}': parameters for {self.groups - 1} groups of layers, "
                f"but '{self.donor.id}' has {self.donor.layers} layers"
            )
        self.dtype = dtype_of(dtype, inputs)
        models = [*self.inputs, *([self.base] if self.base else [])]
        self.vocabulary = shelf.vocabulary(tokenizer, self.donor, models) if vocabularies_differ(models) else None
        self.slots = self._layout(models)
        self._rounded: list[tuple[float, float]] | None = None

    @cached_property
    def key(self) -> str:
        """Hash of everything that determines the result."""
        return merge_key(self.lineage, self.dtype, self.vocabulary.source if self.vocabulary else None)

    @property
    def layers(self) -> int | None:
        """Layers of the result."""
        if self.step.operator != "passthrough":
            return self.donor.layers
        return sum(stop - start for start, stop in self.layer_ranges())

    def blocks(self) -> "Iterator[tuple[str, int, torch.Tensor]]":
        """Yield name, start and elements of each block of the result, in its storage type, in order.

        Raises:
            MergeError: if the operator fails on a tensor.
        """
        import torch

        threads = torch.get_num_threads()
        workers = min(threads, WORKERS)
        # Threads that wait for each other at every operation lose more than they gain, all the more on a busy machine.
        pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
        ahead: deque[tuple[str, int, Future[torch.Tensor]]] = deque()
        try:
            for name, compute in self._computed(threads):
                torch.set_num_threads(1)  # for whoever takes the blocks
                for start in range(0, self.slots[name].header.elements, BLOCK):
                    ahead.append((name, start, pool.submit(compute, start)))
                    if len(ahead) > AHEAD * workers:
                        yield self._ready(*ahead.popleft())
            for one in ahead:
                yield self._ready(*one)
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)  # new threads take the number that was set last, by whomever

    @contextmanager
    def watching_rounding(self) -> Iterator[None]:
        """Measure what rounding to the storage type loses while blocks are computed; the lineage says it then."""
        squares: list[tuple[float, float]] = []
        self._rounded = squares
        try:
            yield
        finally:
            self._rounded = None
        lost, changed = (math.fsum(one[place] for one in squares) for place in (0, 1))
        if changed:
            self.lineage = self.lineage.model_copy(update={"rounding": math.sqrt(lost / changed)})

    def _ready(self, name: str, start: int, block: "Future[torch.Tensor]") -> "tuple[str, int, torch.Tensor]":
        with self._failing(name):
            return name, start, block.result()

    @contextmanager
    def _failing(self, name: str) -> Iterator[None]:
        """Turn what an operator stumbles over into an error that names the tensor."""
        try:
            yield
        except (RuntimeError, ValueError, TypeError) as error:
            reason = first_line(error)
            raise MergeError(f"merge '{self.step.name}' ({self.step.operator}): {name}: {reason}") from error

    def _computed(self, threads: int) -> "Iterator[tuple[str, Callable[[int], torch.Tensor]]]":
        """Yield each tensor's name, and what returns the block of it that starts somewhere."""
        import torch

        if self.operator.statistics:
            for checkpoint in self.inputs:  # recorded now if they never were, which needs gradients
                self.shelf.statistic(self.operator.statistics, checkpoint)
        draw = (
            self.step.operator,
            self.lineage.input_hashes,
            self.lineage.base,
            str([value for key, value in self.values.items() if key not in ("weight", "lambda", "normalize")]),
            self.seed,
        )
        with torch.random.fork_rng(devices=[]), self.shelf.memo.draw(draw) as drawn:
            torch.manual_seed(self.seed)
            for name, slot in self.slots.items():
                torch.set_num_threads(threads)
                with self._failing(name), torch.no_grad():
                    compute = self._compute(name, slot, drawn)
                yield name, compute

    def _compute(self, name: str, slot: Slot, drawn: dict[Hashable, Mask]) -> "Callable[[int], torch.Tensor]":
        header = slot.header
        whole = self.operator.load()(self._group(name, slot, drawn)) if header.floating else None
        agreed = None if whole else self._agreed(name, slot)

        def block(start: int) -> "torch.Tensor":
            stop = min(start + BLOCK, header.elements)
            if whole:
                exact = whole(start, stop)
                found = exact.to(header.torch_dtype)
                if self._rounded is not None and start == 0:  # a part tells enough
                    self._rounded.append(self._squares(slot, name, exact.float(), found.float()))
            else:
                found = cast("torch.Tensor", agreed)[start:stop]
            if stop == header.elements:
                self._release(slot)
            return found

        return block

    def _squares(self, slot: Slot, name: str, exact: "torch.Tensor", stored: "torch.Tensor") -> tuple[float, float]:
        """Return the squared norms of what rounding changed in a first block, and of what the merge did."""
        index, source = slot.sources[0]
        origin = self._tensor(self.base, name) if self.base else self._tensor(self.inputs[index], source)
        change = exact - origin[: exact.numel()].float()
        return float((stored - exact).square().sum()), float(change.square().sum())

    def _group(self, name: str, slot: Slot, drawn: dict[Hashable, Mask]) -> Group:
        sources = [(self.inputs[index], source) for index, source in slot.sources]
        place = group_of(layer_of(name), self.donor.layers or 1, self.groups)
        kind = self.operator.statistics
        return Group(
            name=name,
            operator=self.operator,
            shape=slot.header.shape,
            inputs=tuple(self._tensor(one, source) for one, source in sources),
            base=self._tensor(self.base, name) if self.base else None,
            values=values_at(self.operator, self.values, place, self.groups, len(self.inputs)),
            hashes=(*self.lineage.input_hashes, self.lineage.base or ""),
            memo=self.shelf.memo,
            drawn=drawn,
            statistics=tuple(self.shelf.statistic(kind, one).flat(source) for one, source in sources) if kind else (),
        )

    def _tensor(self, checkpoint: Checkpoint, name: str) -> "torch.Tensor":
        if self.vocabulary and (aligned := self.vocabulary.tensor(checkpoint.content_hash, name)) is not None:
            return aligned
        return self.shelf.weights(checkpoint).flat(name)

    def _agreed(self, name: str, slot: Slot) -> "torch.Tensor":
        """Return a tensor that is no floating-point number, which all inputs must agree on."""
        import torch

        tensors = [self._tensor(self.inputs[index], source) for index, source in slot.sources]
        if any(not torch.equal(one, tensors[0]) for one in tensors[1:]):
            raise MergeError(f"merge '{self.step.name}': {name} holds no floating-point numbers and differs")
        return tensors[0]

    def _release(self, slot: Slot) -> None:
        for index, source in slot.sources:
            self.shelf.weights(self.inputs[index]).release(source)
            if self.operator.statistics:
                self.shelf.statistic(self.operator.statistics, self.inputs[index]).release(source)

    def layer_ranges(self) -> list[tuple[int, int]]:
        """Return first layer and the one after the last that a stack takes from each input."""
        count = self.donor.layers or 0
        values = values_at(self.operator, self.values, 0, 1, len(self.inputs))
        ranges = []
        for name, first, last in zip(self.step.inputs, values["first"], values["last"], strict=True):  # type: ignore[arg-type]
            start, stop = int(first), count if last == -1 else int(last)
            if not 0 <= start < stop <= count:
                raise MergeError(
                    f"merge '{self.step.name}': layers {start} to {stop} of '{name}', which has {count}; "
                    "'first' is counted from 0, 'last' is the one after the last"
                )
            ranges.append((start, stop))
        return ranges

    def _layout(self, models: list[Checkpoint]) -> dict[str, Slot]:
        """Return the result's tensors in mergekit's order, which random masks depend on: by name.

        Raises:
            MergeError: if a tensor is missing in a model or has another shape there.
        """
        headers = [self.shelf.weights(one).headers for one in models]
        if self.step.operator == "passthrough":
            return self._stacked(headers)
        slots = {}
        for name, header in headers[0].items():
            shape = self.vocabulary.shape(name, header.shape) if self.vocabulary else header.shape
            for model, others in zip(models, headers, strict=True):
                if name not in others:
                    raise MergeError(f"merge '{self.step.name}': '{model.id}' has no tensor {name}")
                found = self.vocabulary.shape(name, others[name].shape) if self.vocabulary else others[name].shape
                if found != shape:
                    raise MergeError(
                        f"merge '{self.step.name}': {name} has shape {list(shape)} in '{models[0].id}' "
                        f"and {list(found)} in '{model.id}'"
                    )
            sources = tuple((index, name) for index in range(len(self.inputs)))
            slots[name] = Slot(self._stored(header, shape), sources)
        for model, others in zip(models, headers, strict=True):
            if extra := sorted(others.keys() - headers[0].keys()):
                raise MergeError(
                    f"merge '{self.step.name}': '{models[0].id}' has no tensor {extra[0]} ('{model.id}' has)"
                )
        return dict(sorted(slots.items()))

    def _stacked(self, headers: list[dict[str, TensorHeader]]) -> dict[str, Slot]:
        """Lay layers of several models on one another: embeddings of the first, final norm and head of the last."""
        slots: dict[str, Slot] = {}
        offset, last = 0, len(self.inputs) - 1
        for index, (start, stop) in enumerate(self.layer_ranges()):
            for name, header in headers[index].items():
                layer = layer_of(name)
                if layer is None and index != (0 if is_input_embedding(name) else last):
                    continue
                if layer is not None and not start <= layer < stop:
                    continue
                target = name if layer is None else in_layer(name, offset + layer - start)
                shape = self.vocabulary.shape(name, header.shape) if self.vocabulary else header.shape
                slots[target] = Slot(self._stored(header, shape), ((index, name),))
            offset += stop - start
        return dict(sorted(slots.items()))

    def _stored(self, header: TensorHeader, shape: tuple[int, ...]) -> TensorHeader:
        kind = _STORED[self.dtype] if header.floating else header.dtype
        return TensorHeader(file="", dtype=kind, shape=shape)


def lineage_of(
    step: MergeStep, inputs: Sequence[Checkpoint], base: Checkpoint | None, seed: int, texts: str | None = None
) -> Lineage:
    """Check a step and return how its result comes about; arguments as of `Merge`.

    Raises:
        MergeError: if the operator does not fit the inputs.
    """
    operator = OPERATORS.get(step.operator)
    try:
        values = operator.resolve(step.operator, len(inputs), step.parameters)
    except MergeError as error:
        raise MergeError(f"merge '{step.name}': {error}") from None
    wants_base = operator.start == "base" or bool(values.get("from_base"))
    if wants_base and base is None:
        raise MergeError(
            f"merge '{step.name}': operator '{step.operator}' works on task vectors; set zoo.base in the recipe"
        )
    start = base if wants_base else None
    models = [*inputs, *([start] if start else [])]
    return Lineage(
        operator=step.operator,
        inputs=step.inputs,
        input_hashes=tuple(checkpoint.content_hash for checkpoint in inputs),
        parameters=values,
        base=start.content_hash if start else None,
        seed=seed if operator.random else None,
        texts=texts if operator.statistics else None,
        licences={one.id: one.licence for one in models},
        dequantised={name: kind for one in inputs for name, kind in one.dequantised.items()},
    )


def merge_key(lineage: Lineage, dtype: str, tokenizer: str | None) -> str:
    """Return the hash of everything that determines a merge.

    Args:
        lineage: From `lineage_of`.
        dtype: Storage type of the result.
        tokenizer: "union" or "base" where vocabularies differ, else None.
    """
    from importlib.metadata import version

    known = lineage.model_dump(exclude={"inputs", "licences", "dequantised", "rounding"})
    return digest(["merge", 2, known, dtype, tokenizer, version("mergekit")])


def dtype_of(dtype: str | None, inputs: Sequence[Checkpoint]) -> str:
    """Return the storage type of a merge: the one wanted, else the first input's."""
    own = TORCH_DTYPES.get(inputs[0].dtype)
    return dtype or (own if own in _STORED else "float32")


def vocabularies_differ(checkpoints: Sequence[Checkpoint]) -> bool:
    """Return whether embeddings of some models have to be brought together before they are merged."""
    return len({(one.tokenizer.vocabulary, one.tokenizer.added_tokens, one.vocabulary_size) for one in checkpoints}) > 1
