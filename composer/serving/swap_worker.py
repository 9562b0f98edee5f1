"""What vLLM's worker can do more in a living engine."""

from typing import Any

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead


class SwapWorker:
    """Mixed into vLLM's worker, which has the methods and attributes that it uses."""

    reload_weights: Any
    model_runner: Any

    def swap_weights(self, directory: str) -> None:
        """Reload all weights from a directory.

        On a CPU an output head keeps a packed copy of its weights. Reloading packs what it loads anew; a head that is
        the embedding is not loaded itself, and would keep the copy of the old weights.

        What the old weights left in the key-value cache goes too: if that is NaN, it is NaN in every answer of the new
        ones, since attention multiplies the unused places of a block by nothing, and does not leave them out.
        """
        self.reload_weights(weights_path=directory)
        for module in self.model_runner.get_model().modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)
        _clear(self.model_runner.kv_caches)


def _clear(caches: Any) -> None:
    for one in caches:
        if isinstance(one, torch.Tensor):
            one.zero_()
        else:  # states of several kinds
            _clear(one)
