"""A vLLM engine that candidates are swapped into: to a search by vLLM what `LiveModel` is to one by torch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from composer.artefacts import digest
from composer.errors import EvaluationError, ServeError, first_line
from composer.evaluation.live import LiveScorer
from composer.evaluation.lm import Answer, Pair, Tokens
from composer.evaluation.scorer import WAY_OUT
from composer.evaluation.tasks import Split
from composer.merging.engine.export import write_model
from composer.merging.engine.merge import Merge
from composer.serving.engines.machine import has_gpu
from composer.serving.swap import LivingEngine, berth
from composer.zoo import Checkpoint
from composer.zoo.tokenizers import fingerprint
from composer.zoo.weights import read_headers

COSMETIC = {"_name_or_path", "transformers_version", "use_cache", "pad_token_id", "dtype", "torch_dtype"}
"""Keys of a configuration that change no answer, or are seen to otherwise."""
KV_CACHE_MB = 256
"""Memory for keys and values on a CPU, at least."""
LONGEST_AT_ONCE = 4
"""Of the longest requests, so many at least have room there."""


class SwappedModel:
    """At most one engine, for models of one configuration, shape and tokenizer; for others another one is started."""

    def __init__(self, split: Split, log: Path) -> None:
        """Start nothing yet.

        Args:
            split: The items, and what is computed in: float32 on a CPU, the weights' own type on a GPU by default.
            log: Takes the engine's output; removed when it is stopped in good order.
        """
        self._split, self._log = split, log
        self._kind: str | None = None
        self._engine: LivingEngine | None = None
        self._scorer: LiveScorer | None = None
        self.config: Any = None

    def load(self, merge: Merge) -> LiveScorer:
        """Merge into the engine; return what scores it.

        Raises:
            MergeError: if the operator fails.
            ServeError: if the engine dies or cannot take the model.
        """
        with berth(sum(slot.header.nbytes for slot in merge.slots.values())) as directory:
            write_model(merge, directory, lasting=False)
            made = merge.donor.model_copy(update={"id": merge.step.name, "path": str(directory)})
            return self.take(made)

    def take(self, checkpoint: Checkpoint) -> LiveScorer:
        """Put a checkpoint's weights into the engine; return what scores it. Its files are not needed afterwards.

        Raises:
            EvaluationError: if a task or an item cannot be scored with it.
            ServeError: if the engine dies or cannot take the model.
        """
        directory = Path(checkpoint.path)
        kind = self._kind_of(directory)
        try:
            if self._engine is None or self._scorer is None or kind != self._kind:
                self.close()
                self._scorer = self._start(checkpoint)
                self._kind = kind
            else:
                self._engine.swap(directory)
        except ServeError as error:
            self._forget()
            raise ServeError(f"{error}; {WAY_OUT}") from None
        return self._scorer

    def score(self, pairs: Sequence[Pair]) -> list[Answer]:
        """See `LivingEngine.score`."""
        return self._ask("score", pairs)  # type: ignore[no-any-return]

    def write(self, prompts: Sequence[Tokens], max_tokens: int, stop: Sequence[str] = ()) -> list[Tokens]:
        """See `LivingEngine.write`."""
        return self._ask("write", prompts, max_tokens, stop)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Stop the engine, if one runs."""
        if self._engine is not None:
            self._forget()
            self._log.unlink(missing_ok=True)

    def _ask(self, method: str, *arguments: Any) -> Any:
        if self._engine is None:
            raise ServeError(f"no engine runs; {WAY_OUT}")
        try:
            return getattr(self._engine, method)(*arguments)
        except ServeError as error:
            self._forget()
            raise ServeError(f"{error}; {WAY_OUT}") from None

    def _forget(self) -> None:
        engine, self._engine, self._scorer, self._kind = self._engine, None, None, None
        if engine is not None:
            engine.stop()

    def _start(self, checkpoint: Checkpoint) -> LiveScorer:
        """Start an engine on a checkpoint; it takes sequences as long as the items need."""
        import torch
        from transformers import AutoConfig, AutoTokenizer

        try:
            self.config = AutoConfig.from_pretrained(checkpoint.path)
            tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
        except Exception as error:  # transformers raises whatever a broken configuration makes it stumble over
            raise EvaluationError(f"'{checkpoint.id}': transformers cannot read it: {first_line(error)}") from error
        scorer = LiveScorer(self, tokenizer, self._split)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what torch keeps for later, the engine does not get
        self._engine = LivingEngine(
            checkpoint,
            self._log,
            dtype=self._dtype(Path(checkpoint.path)),
            max_model_len=scorer.longest,
            kv_cache_mb=max(KV_CACHE_MB, LONGEST_AT_ONCE * scorer.longest * _token_bytes(self.config) >> 20),
        ).__enter__()
        return scorer

    def _dtype(self, directory: Path) -> str:
        if self._split.dtype or not has_gpu():
            return self._split.dtype or "float32"
        config = _read(directory / "config.json")
        # Left to itself, vLLM halves float32.
        return str(config.get("dtype") or config.get("torch_dtype") or "auto")

    def _kind_of(self, directory: Path) -> str:
        """Hash all that an engine keeps when weights are swapped."""
        described = [_read(directory / name) for name in ("config.json", "generation_config.json")]
        plain = [{key: value for key, value in one.items() if key not in COSMETIC} for one in described]
        shapes = {name: header.shape for name, header in read_headers(directory).items()}
        return digest([plain, shapes, fingerprint(directory).model_dump(), self._dtype(directory)])


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text())) if file.is_file() else {}


def _token_bytes(config: Any) -> int:
    """Return what keys and values of a token take at most, in bytes."""
    config = config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    return int(2 * 4 * config.num_hidden_layers * shared * size)
