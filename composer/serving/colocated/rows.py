"""Which expert each row of the running batch belongs to.

vLLM tells logits processors, before each forward pass, of the requests that join, leave and move within the batch;
here one listens and changes no logits.
"""

import re
from functools import lru_cache
from typing import Any, ClassVar

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

_latest: "Rows | None" = None


class Rows(LogitsProcessor):  # type: ignore[misc]
    """Keeps the expert of each row of the batch."""

    count: ClassVar[int]
    """Number of experts; set in the classes that `of` makes, since parameters are checked by a class."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Check that a request names one of the experts.

        Raises:
            VLLMValidationError: if it names none, or one that is not there; the server answers with status 400.
        """
        index = (sampling_params.extra_args or {}).get("expert")
        if type(index) is not int or not 0 <= index < cls.count:
            raise VLLMValidationError(
                f"'expert' in 'vllm_xargs' is {index!r}; give the index of one of the experts, 0 to {cls.count - 1}",
                parameter="vllm_xargs",
            )

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        global _latest
        self._experts: dict[int, int] = {}
        _latest = self

    def is_argmax_invariant(self) -> bool:
        """Return that greedy decoding does not need it."""
        return True

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Return logits `[rows, vocab]` as they are."""
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests within the batch."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._experts.pop(row, None)
        for row, parameters, _, _ in batch_update.added:
            self.validate_params(parameters)
            self._experts[row] = (parameters.extra_args or {})["expert"]
        for source, target, direction in batch_update.moved:
            moved, met = self._experts.pop(source, None), self._experts.pop(target, None)
            if moved is not None:
                self._experts[target] = moved
            if met is not None and direction is MoveDirectionality.SWAP:
                self._experts[source] = met

    def owners(self, lengths: list[int], tokens: int) -> torch.Tensor:
        """Return the expert of each token of the batch, `[tokens]`.

        Args:
            lengths: Tokens of each row; rows without any may be unknown.
            tokens: All of them, padding at the end included, which goes to the last expert.

        Raises:
            KeyError: if a row has tokens and no expert.
        """
        if not self._experts:  # vLLM runs batches without requests, to measure and to warm up
            return torch.zeros(tokens, dtype=torch.long)
        found = [self._experts[row] for row, length in enumerate(lengths) for _ in range(length)]
        return torch.tensor(found + (found[-1:] or [0]) * (tokens - len(found)))


def take(count: int) -> Rows:
    """Return the rows of the engine that is being started; each may be taken once.

    A model runner makes its logits processors, then, in the same process, its model.

    Raises:
        ValueError: if the engine was started without them, or with those for another number of experts.
    """
    global _latest
    rows, _latest = _latest, None
    if rows is None or rows.count != count:
        raise ValueError(f"an engine of {count} experts needs --logits-processors {__name__}:Of{count}")
    return rows


@lru_cache
def of(count: int) -> type[Rows]:
    """Return the class for a number of experts."""
    return type(f"Of{count}", (Rows,), {"count": count, "__module__": __name__, "__doc__": Rows.__doc__})


def __getattr__(name: str) -> Any:
    """Make `Of2`, `Of3` and so on: vLLM is told of logits processors by name, and gives them no arguments."""
    match = re.fullmatch(r"Of([1-9]\d*)", name)
    if match is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return of(int(match[1]))
