"""What a scorer asks of the model it scores, and what all such models have in common: lm-eval's way with texts."""

from typing import Any, Protocol

from lm_eval.models.huggingface import HFLM

from composer.errors import EvaluationError

Tokens = tuple[int, ...]
Pair = tuple[Tokens, Tokens]
"""A context and what follows it."""
Answer = tuple[float, bool]
"""The log-likelihood of what follows, and whether greedy decoding would have written it."""
IMPOSSIBLE: Answer = (-1e4, False)
"""The answer for what is longer than a model reads: not minus infinity, which means and files cannot hold."""


class LanguageModel(Protocol):
    """A model that answers lm-eval's requests; its weights change between calls."""

    @property
    def max_length(self) -> int:
        """Most tokens it reads."""
        ...

    @property
    def max_gen_toks(self) -> int:
        """Tokens it writes where a request does not say how many."""
        ...

    def tok_encode(self, string: str) -> list[int]:
        """Tokenise a text."""
        ...

    def pair(self, task: str, context: str, continuation: str) -> Pair:
        """Tokenise a context and what follows it.

        Raises:
            EvaluationError: if the model cannot score that.
        """
        ...

    def answers(self, pairs: list[Pair]) -> list[Answer]:
        """Answer pairs, in their order."""
        ...

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Answer]:
        """Tokenise and answer."""
        ...

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return log-likelihoods of whole texts."""
        ...

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes after each context."""
        ...

    def settle(self) -> None:
        """Get ready to be asked, whatever was done to the model meanwhile."""
        ...


class Tokenising(HFLM):  # type: ignore[misc]
    """lm-eval's transformers model up to where the model is asked: `answers` and `_model_generate` do that."""

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, **options: Any) -> None:
        self.tokenizer = tokenizer  # lm-eval refuses as objects some kinds that it loads itself, Mistral's for one

    def pair(self, task: str, context: str, continuation: str) -> Pair:
        """Tokenise as `TemplateLM.loglikelihood` does."""
        if context:
            before, after = self._encode_pair(context, continuation)
        else:
            after = self.tok_encode(continuation, add_special_tokens=False)
            before = [self.prefix_token_id]
            if after[:1] == before:
                after = after[1:]
        if not before or not after:
            raise EvaluationError(
                f"task '{task}': {continuation[:40]!r}, {len(after)} tokens after {len(before)}, cannot be scored"
            )
        return tuple(before), tuple(after)

    def _loglikelihood_tokens(self, requests: list[Any], **options: Any) -> list[Answer]:
        return self.answers([(tuple(context), tuple(continuation)) for _, context, continuation in requests])

    def answers(self, pairs: list[Pair]) -> list[Answer]:
        """Answer pairs, in their order; to the model, what is longer than it reads is as good as impossible."""
        answers = iter(self._answers([pair for pair in pairs if len(pair[1]) <= self.max_length]))
        return [next(answers) if len(pair[1]) <= self.max_length else IMPOSSIBLE for pair in pairs]

    def _answers(self, pairs: list[Pair]) -> list[Answer]:
        """Answer pairs whose continuations the model can read as a whole, in their order."""
        raise NotImplementedError

    def settle(self) -> None:
        """Get ready to be asked, whatever was done to the model meanwhile."""
