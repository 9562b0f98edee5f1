"""A living model whose parameters candidates are merged into, one after another."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer.errors import MergeError, first_line
from composer.merging.engine.export import write_model, write_model_description
from composer.merging.engine.merge import Merge

if TYPE_CHECKING:
    import torch


class LiveModel:
    """A transformers model, built once for all merges of one shape and vocabulary.

    Computed in float32 on a CPU and in the merge's storage type on a GPU, where nothing else is asked for; the values
    of the weights are those of the storage type in either case. The arithmetic of the merge is always the CPU's: a GPU
    rounds otherwise, and what is scored must be what is written.

    Attributes:
        model: The model; its parameters change with `load`.
        tokenizer: Its tokenizer.
    """

    def __init__(self, merge: Merge, dtype: str | None = None) -> None:
        """Build a model of the shape of a merge, with no weights in it yet.

        Args:
            merge: Any merge of the shape.
            dtype: What it is computed in.

        Raises:
            MergeError: if transformers cannot build it.
        """
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
        from transformers.initialization import no_init_weights

        self.shape = shape_of(merge)
        self._remote = any(one.remote_code for one in merge.inputs)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._dtype = getattr(torch, dtype or ("float32" if self._device == "cpu" else merge.dtype))
        try:
            with tempfile.TemporaryDirectory(prefix="model-composer-") as home:
                write_model_description(merge, Path(home))
                config = AutoConfig.from_pretrained(home, trust_remote_code=self._remote)
                self.tokenizer: Any = AutoTokenizer.from_pretrained(home, trust_remote_code=self._remote)
                with no_init_weights():
                    model = AutoModelForCausalLM.from_config(config, dtype=self._dtype, trust_remote_code=self._remote)
            self.model: Any = model.to(self._device).eval()
            self.model.tie_weights()
        except Exception as error:  # transformers raises whatever a broken configuration makes it stumble over
            reason = first_line(error)
            raise MergeError(f"merge '{merge.step.name}': transformers cannot build the model: {reason}") from error
        self._targets = self._find_targets(merge)

    def load(self, merge: Merge) -> None:
        """Merge into the model's parameters.

        Raises:
            MergeError: if the operator fails.
        """
        if self._targets is None:
            self._load_from_disk(merge)
            return
        for name, start, block in merge.blocks():
            self._targets[name][start : start + block.numel()].copy_(block)

    def _find_targets(self, merge: Merge) -> "dict[str, torch.Tensor] | None":
        """Return the flat parameter that each tensor goes into, or None if names in the model are not the files'."""
        state = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        targets = {}
        for name, slot in merge.slots.items():
            if name not in state or tuple(state[name].shape) != slot.header.shape or not state[name].is_contiguous():
                return None
            targets[name] = state[name].data.view(-1)
        filled = {tensor.data_ptr() for tensor in targets.values()}
        if any(parameter.data_ptr() not in filled for parameter in self.model.parameters()):
            return None
        return targets

    def _load_from_disk(self, merge: Merge) -> None:
        """Fill the model by way of files, for architectures whose weights transformers converts when it loads them."""
        from transformers import AutoModelForCausalLM

        with tempfile.TemporaryDirectory(prefix="model-composer-") as home:
            write_model(merge, Path(home), lasting=False)
            loaded = AutoModelForCausalLM.from_pretrained(home, dtype=self._dtype, trust_remote_code=self._remote)
        self.model.load_state_dict(loaded.state_dict())


def shape_of(merge: Merge) -> tuple[object, ...]:
    """Return what two merges must share for the same living model to do for both."""
    # The shelf keeps one of each vocabulary.
    vocabulary = id(merge.vocabulary) if merge.vocabulary else None
    return merge.donor.content_hash, merge.layers, merge.dtype, vocabulary
