"""What does not change from one trial to the next: masks, scales, angles."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

DRAWS = 3
"""Sets of random masks remembered; a set has a bit for each weight of each input."""


@dataclass(frozen=True)
class Mask:
    """Which elements of a task vector are kept, one bit each, and what the kept ones are multiplied by."""

    bits: "torch.Tensor"
    """`[ceil(elements / 8)]`, uint8, the first element in the highest bit."""
    scale: "torch.Tensor | None" = None
    """A scalar."""

    def apply(self, block: "torch.Tensor", start: int) -> None:
        """Mask a block `[elements]` in place; `start`, its place in the tensor, is a multiple of 8."""
        import numpy as np
        import torch

        count = block.numel()
        packed = self.bits[start // 8 : (start + count + 7) // 8].numpy()
        block.mul_(torch.from_numpy(np.unpackbits(packed, count=count)))
        if self.scale is not None:
            block.mul_(self.scale)

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return self.bits.numel()


class Memo:
    """Remembers within bounds; what is forgotten is computed again, with the same result."""

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit if limit is not None else psutil.virtual_memory().total // 8
        self._kept: OrderedDict[Hashable, Mask] = OrderedDict()
        self._size = 0
        self._numbers: dict[Hashable, torch.Tensor] = {}
        self._draws: OrderedDict[Hashable, dict[Hashable, Mask]] = OrderedDict()

    def mask(self, key: Hashable, make: Callable[[], Mask]) -> Mask:
        """Return a mask that depends on nothing but its key."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        found = self._kept[key] = make()
        self._size += found.nbytes
        while self._size > self._limit and len(self._kept) > 1:
            self._size -= self._kept.popitem(last=False)[1].nbytes
        return found

    def number(self, key: Hashable, make: Callable[[], "torch.Tensor"]) -> "torch.Tensor":
        """Return a tensor of a few numbers that depends on nothing but its key."""
        if key not in self._numbers:
            self._numbers[key] = make()
        return self._numbers[key]

    @contextmanager
    def draw(self, key: Hashable) -> Iterator[dict[Hashable, Mask]]:
        """Yield the random masks of one merge, empty the first time.

        They are drawn one after another from one stream, so a set is remembered whole or not at all.
        """
        drawn = self._draws.pop(key, {})
        yield drawn
        self._draws[key] = drawn
        while len(self._draws) > DRAWS:
            self._draws.popitem(last=False)
