"""Bringing differing vocabularies together, by mergekit's own tokenizer handling."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer.errors import MergeError, first_line
from composer.zoo import Checkpoint, SafetensorsWeights
from composer.zoo.kinds import is_vocabulary

if TYPE_CHECKING:
    import torch


@dataclass
class Vocabulary:
    """One vocabulary for all models of a merge."""

    source: str
    """"union" or "base"."""
    tokenizer: Any
    """The tokenizer of the result."""
    tensors: "dict[tuple[str, str], torch.Tensor]"
    """Embeddings and heads with a row for each token, flat, by content hash and name."""

    @property
    def size(self) -> int:
        """Number of tokens."""
        return len(self.tokenizer.get_vocab())

    def tensor(self, content_hash: str, name: str) -> "torch.Tensor | None":
        """Return a model's tensor brought to this vocabulary, or None if it does not depend on it."""
        return self.tensors.get((content_hash, name))

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that a tensor has in this vocabulary."""
        return (self.size, *shape[1:]) if is_vocabulary(name) else shape


@contextlib.contextmanager
def plain_paths(checkpoints: Sequence[Checkpoint]) -> Iterator[dict[str, str]]:
    """Yield a path for each content hash that mergekit reads rightly.

    mergekit parses "+" and "@" in a path as LoRA and revision, and keeps files open by path for the life of the
    process; links named by content hash avoid both.
    """
    with tempfile.TemporaryDirectory(prefix="model-composer-") as directory:
        links = {}
        for checkpoint in checkpoints:
            link = Path(directory) / checkpoint.content_hash
            if not link.exists():
                link.symlink_to(checkpoint.path)
            links[checkpoint.content_hash] = str(link)
        yield links


def align_vocabularies(source: str, donor: Checkpoint, models: Sequence[Checkpoint]) -> Vocabulary:
    """Bring the embeddings and heads of some models to one vocabulary.

    Args:
        source: "union" for every token of any of them, "base" for the donor's.
        donor: Whose tokenizer is extended.
        models: In the order of the merge; the base last.

    Raises:
        MergeError: if mergekit cannot do it.
    """
    from mergekit.common import ModelReference
    from mergekit.tokenizer import PermutedVocabulary
    from mergekit.tokenizer.build import build_tokenizer

    remote = any(one.remote_code for one in models)
    try:
        with plain_paths([donor, *models]) as paths:
            references = {one.content_hash: ModelReference.parse(paths[one.content_hash]) for one in [donor, *models]}
            ordered = list(dict.fromkeys(references[one.content_hash] for one in models))
            base = references[donor.content_hash]
            info = build_tokenizer(base, ordered, source, trust_remote_code=remote, add_tokens=())
            weights = {one.content_hash: SafetensorsWeights(Path(one.path)) for one in models}
            names = [name for name in next(iter(weights.values())).headers if is_vocabulary(name)]
            tensors = {}
            for name in names:
                task = PermutedVocabulary.model_construct(
                    tokens=None, pad_to_multiple_of=None, base_model=base, vocabulary_axis=0
                )
                rows = {
                    references[key]: one.read(name, 0, one.headers[name].rows).float() for key, one in weights.items()
                }
                for reference, tensor in task.execute(info, rows).items():
                    key = next(key for key, found in references.items() if found == reference)
                    tensors[key, name] = tensor.flatten()
    except Exception as error:  # whatever a tokenizer makes transformers or mergekit stumble over
        raise MergeError(f"the vocabularies of {', '.join(one.id for one in models)}: {first_line(error)}") from error
    return Vocabulary(source, info.tokenizer, tensors)
