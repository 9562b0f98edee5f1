"""A model in an engine, as lm-eval sees it: texts are cut and joined here, the engine gives likelihoods and tokens."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Protocol

import torch

from composer.errors import ServeError
from composer.evaluation.lm import Answer, Pair, Tokenising, Tokens

AT_ONCE = 1024
"""Prompts that are handed over at a time: the engine makes its own batches."""
WITHOUT_EFFECT = {"do_sample", "temperature", "top_p", "top_k", "min_p"}
"""Settings that greedy decoding has no use for."""


class Engine(Protocol):
    """What is asked of an engine."""

    config: Any
    """The model's configuration, as transformers reads it."""

    def score(self, pairs: Sequence[Pair]) -> list[Answer]:
        """Return for each pair the log-likelihood (nats) of what follows, and whether greedy decoding writes it."""
        ...

    def write(self, prompts: Sequence[Tokens], max_tokens: int, stop: Sequence[str] = ()) -> list[Tokens]:
        """Return the tokens that greedy decoding writes after each prompt, up to those that end it."""
        ...


class EngineModel(Tokenising):
    """lm-eval's transformers model whose forward passes are made by an engine."""

    def __init__(self, engine: Engine, tokenizer: Any) -> None:
        """Take an engine, which need not run yet.

        Args:
            engine: It is asked.
            tokenizer: Its model's tokenizer.
        """
        stand_in = SimpleNamespace(config=engine.config, device=torch.device("cpu"))
        super().__init__(pretrained=stand_in, tokenizer=tokenizer, batch_size=AT_ONCE)
        self._engine = engine

    def _answers(self, pairs: list[Pair]) -> list[Answer]:
        """Answer pairs, in their order."""
        return self._engine.score(pairs) if pairs else []

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **settings: Any) -> torch.Tensor:
        """Return each row of `context` with what follows it, padded on the right.

        Raises:
            ServeError: if a task asks for more than greedy decoding.
        """
        mask = settings.pop("attention_mask")
        if settings.get("do_sample") or (others := settings.keys() - WITHOUT_EFFECT):
            wanted = "do_sample" if settings.get("do_sample") else min(others)
            raise ServeError(f"a task generates with '{wanted}', which an engine does not; set evaluate.scorer=torch")
        prompts = [tuple(row[own.bool()].tolist()) for row, own in zip(context, mask, strict=True)]
        written = self._engine.write(prompts, max_length - context.shape[1], stop)
        found = torch.full((len(written), max(map(len, written))), self.tokenizer.pad_token_id)
        for row, tokens in zip(found, written, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        return torch.cat([context, found], dim=1)
