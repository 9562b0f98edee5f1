"""Rows of a batch, brought together by expert."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """Which rows of a batch belong to which expert.

    Where there is only one expert, nothing is moved.
    """

    experts: list[int]
    """Those that have rows, ascending."""
    sizes: list[int]
    """Rows of each of them."""
    order: Tensor | None
    """`[rows]`: where in the batch each row of the groups, one group after another, comes from."""
    back: Tensor | None
    """`[rows]`: the inverse."""

    @classmethod
    def of(cls, owners: Tensor) -> "Groups":
        """Group rows by their owners.

        Args:
            owners: `[rows]`, at least one, the expert of each row.
        """
        experts, sizes = torch.unique(owners, return_counts=True)
        if len(experts) == 1:
            return cls(experts.tolist(), sizes.tolist(), None, None)
        order = torch.argsort(owners, stable=True)
        return cls(experts.tolist(), sizes.tolist(), order, torch.argsort(order))

    def split(self, rows: Tensor) -> Sequence[Tensor]:
        """Return the rows of each expert.

        Args:
            rows: `[rows, ...]` in the order of the batch.
        """
        return [rows] if self.order is None else torch.split(rows[self.order], self.sizes)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return rows `[rows, ...]` in the order of the batch.

        Args:
            parts: The rows of each expert.
        """
        return parts[0] if self.back is None else torch.cat(list(parts))[self.back]
