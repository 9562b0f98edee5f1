"""Scoring a checkpoint in this process, as lm-eval's own transformers model does."""

from pathlib import Path
from typing import Any

from composer.artefacts import Store, digest
from composer.errors import EvaluationError, first_line
from composer.evaluation.answers import Answers
from composer.evaluation.scores import Scores
from composer.evaluation.settings import Scorer
from composer.evaluation.tasks import Split
from composer.zoo import Checkpoint


def score_checkpoint(checkpoint: Checkpoint, split: Split, store: Store, *, batch_size: int = 16) -> Scores:
    """Score a checkpoint on a split, or return the same scores measured before.

    Args:
        checkpoint: The model.
        split: The items, and what is computed in.
        store: Keeps the scores under the content hash of the checkpoint and of the items.
        batch_size: Items scored at once.

    Raises:
        EvaluationError: if transformers cannot load it, or its log-likelihoods are not finite.
    """
    from composer.evaluation.live import LiveScorer

    known = known_scores(checkpoint, split, store)
    if known.is_file():
        return Scores.load(known).model_copy(update={"subject": checkpoint.id})
    loaded = load_model(checkpoint, batch_size, split.dtype)
    scores = LiveScorer(loaded.model, loaded.tokenizer, split, batch_size=batch_size).score(checkpoint.id)
    scores.save(known)
    return scores


def answer_checkpoint(checkpoint: Checkpoint, split: Split, store: Store, *, batch_size: int = 16) -> Answers:
    """Return what a checkpoint answers to the items of a split, asked once; its scores are kept on the way.

    Arguments and errors as of `score_checkpoint`.
    """
    from composer.evaluation.live import LiveScorer

    known = _known("answers", checkpoint, split, store)
    if known.is_file():
        return Answers.load(known).model_copy(update={"subject": checkpoint.id})
    loaded = load_model(checkpoint, batch_size, split.dtype)
    scorer = LiveScorer(loaded.model, loaded.tokenizer, split, batch_size=batch_size)
    scores, answers = scorer.answers(checkpoint.id)
    scores.save(known_scores(checkpoint, split, store))
    answers.save(known)
    return answers


def known_scores(checkpoint: Checkpoint, split: Split, store: Store, scorer: Scorer = "torch") -> Path:
    """Return where scores of a checkpoint are kept; those of another scorer differ in their last digits."""
    return _known("scores", checkpoint, split, store, *([] if scorer == "torch" else [scorer]))


def _known(kind: str, checkpoint: Checkpoint, split: Split, store: Store, *more: str) -> Path:
    return store.path(kind, digest([checkpoint.content_hash, split.name, split.fingerprint, *more]) + ".json")


def load_model(checkpoint: Checkpoint, batch_size: int, dtype: str | None = None) -> Any:
    """Load a checkpoint as lm-eval's transformers model, without its progress bars.

    Args:
        checkpoint: The model.
        batch_size: Items scored at once.
        dtype: What it is computed in; by default float32 on a CPU, its own type on a GPU.

    Raises:
        EvaluationError: if transformers cannot load it.
    """
    import torch
    from lm_eval.models.huggingface import HFLM

    from composer.mixture.classes import CLASSES, register  # a mixture's room, which goes by scores itself

    class QuietModel(HFLM):  # type: ignore[misc]
        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().generate_until(requests, disable_tqdm=True)

    cuda = torch.cuda.is_available()
    if checkpoint.architecture in CLASSES:
        register()
    try:
        return QuietModel(
            pretrained=checkpoint.path,
            trust_remote_code=checkpoint.remote_code,
            dtype=dtype or ("auto" if cuda else "float32"),
            softmax_dtype="float32",  # in bfloat16, log-probabilities have two digits
            batch_size=batch_size,
            device="cuda" if cuda else "cpu",
        )
    except Exception as error:  # transformers raises whatever a broken checkpoint makes it stumble over
        reason = first_line(error)
        raise EvaluationError(f"{checkpoint.path}: transformers cannot load this checkpoint: {reason}") from error
