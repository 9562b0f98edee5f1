"""Encoders: the first layers of a causal language model, read as features of a text."""

from typing import Any

import torch
from torch import Tensor, nn

MAX_TOKENS = 256
"""Longer texts are read up to here; what a request is about shows early."""

_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")


class Encoder:
    """Pools the hidden states of a text after the first `layers` decoder layers.

    The feature is the mean over the text's own tokens: no BOS, no chat template, no padding, one text at a time,
    so it depends on nothing but the text.
    """

    def __init__(self, path: str, layers: int, *, remote_code: bool = False) -> None:
        """Load `layers` layers of the checkpoint at `path`, in float32 on the CPU."""
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        options = {"local_files_only": True, "trust_remote_code": remote_code}
        config = AutoConfig.from_pretrained(path, **options)
        config.get_text_config().num_hidden_layers = max(1, layers)
        self.layers = layers
        self.tokenizer = AutoTokenizer.from_pretrained(path, **options)
        self.model: Any = AutoModel.from_pretrained(path, config=config, dtype=torch.float32, **options).eval()
        for name in _FINAL_NORMS:
            if hasattr(self.model, name):
                # The gates live in the raw residual stream, which the final norm would rescale.
                setattr(self.model, name, nn.Identity())

    @torch.inference_mode()
    def __call__(self, text: str) -> Tensor:
        """Return the feature of a text, `[hidden]`."""
        ids = token_ids(self.tokenizer, text)
        if self.layers == 0:
            states: Tensor = self.model.get_input_embeddings()(ids)
        else:
            states = self.model(input_ids=ids, use_cache=False).last_hidden_state
        return states[0].mean(dim=0)


@torch.inference_mode()
def features_by_layer(path: str, texts: list[str], *, remote_code: bool = False) -> Tensor:
    """Return the features of texts after 0, 1, … layers of a checkpoint, `[layers, texts, hidden]`."""
    from transformers import AutoModel, AutoTokenizer

    options = {"local_files_only": True, "trust_remote_code": remote_code}
    tokenizer = AutoTokenizer.from_pretrained(path, **options)
    model = AutoModel.from_pretrained(path, dtype=torch.float32, **options).eval()
    rows = []
    for text in texts:
        states = model(input_ids=token_ids(tokenizer, text), output_hidden_states=True, use_cache=False)
        # The last entry has the final norm on it and is left out.
        rows.append(torch.stack([layer[0].mean(dim=0) for layer in states.hidden_states[:-1]]))
    return torch.stack(rows, dim=1)


def token_ids(tokenizer: Any, text: str) -> Tensor:
    """Return the tokens of a text without special tokens, `[1, tokens]`; an empty text is one space."""
    ids = tokenizer(text, add_special_tokens=False, truncation=True, max_length=MAX_TOKENS).input_ids
    if not ids:
        ids = tokenizer(" ", add_special_tokens=False).input_ids or [tokenizer.eos_token_id or 0]
    return torch.tensor([ids])
