"""The model of several experts, as vLLM runs it.

Each expert is vLLM's own model of its architecture. A step brings the tokens of a batch together by expert and takes
all experts through their layers side by side: everything but attention is computed by each on its own tokens, and
attention, which has no weights, once for all of them on one key-value cache.
"""

import copy
from collections.abc import Iterable
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import ModelConfig, VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.weight_tying import maybe_retie_word_embeddings
from vllm.model_executor.models.utils import maybe_prefix
from vllm.transformers_utils.config import get_config

from composer.serving.colocated.groups import Groups
from composer.serving.colocated.rows import take

_MODULES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2"}
"""Modules of `vllm.model_executor.models` by the class they hold."""


class ColocatedForCausalLM(nn.Module):
    """Experts of one architecture, side by side.

    The hidden states that it gives have one more channel than the experts', which holds the index of the expert that
    computed them: vLLM picks, reorders and cuts hidden states before it asks for logits, and only what is in them
    comes along.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Build the experts without their weights.

        Raises:
            ValueError: if an expert takes shorter sequences than the engine is to take.
        """
        super().__init__()
        config = vllm_config.model_config.hf_config
        directories: list[str] = config.colocated_experts
        name: str = config.colocated_architecture
        kind = getattr(import_module(f"vllm.model_executor.models.{_MODULES[name]}"), name)
        self.rows = take(len(directories))
        self._configs = [_own_config(vllm_config.model_config, directory) for directory in directories]
        self.experts: Any = nn.ModuleList()
        for index, own in enumerate(self._configs):
            whole = copy.copy(vllm_config)
            whole.model_config = own
            # The only number in the name of a layer may be its place, so "expert0", not "experts.0".
            self.experts.append(kind(vllm_config=whole, prefix=maybe_prefix(prefix, f"expert{index}")))
        self._share_attention(vllm_config)
        self.secondary_weights = [
            DefaultModelLoader.Source(directory, revision=None, prefix=f"experts.{index}.")
            for index, directory in enumerate(directories)
            if index
        ]

    def _share_attention(self, vllm_config: VllmConfig) -> None:
        """Give all experts the attention of the first one, and vLLM only that to make a key-value cache for."""
        first, *others = self.experts
        for expert in others:
            for layer, shared in zip(expert.model.layers, first.model.layers, strict=True):
                del vllm_config.compilation_config.static_forward_context[layer.self_attn.attn.layer_name]
                layer.self_attn.attn = shared.self_attn.attn

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Refuse: outside of a forward pass nothing says which expert's embeddings are meant.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("co-located experts take token ids only")

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Return hidden states `[tokens, hidden + 1]`.

        Args:
            input_ids: `[tokens]`.
            positions: `[tokens]`, of each in its own sequence.
            intermediate_tensors: Not used: no part of the model is elsewhere.
            inputs_embeds: Must be None.
        """
        if input_ids is None:
            return self.embed_input_ids(positions)
        owners = self._owners(len(input_ids)).to(input_ids.device)
        groups = Groups.of(owners)
        streams = [
            _Stream(self.experts[expert].model, ids, places)
            for expert, ids, places in zip(
                groups.experts, groups.split(input_ids), groups.split(positions), strict=True
            )
        ]
        for place, layer in enumerate(self.experts[0].model.layers):
            projected = zip(*(stream.project(place) for stream in streams), strict=True)
            attended = layer.self_attn.attn(*(groups.join(parts) for parts in projected))
            for stream, part in zip(streams, groups.split(attended), strict=True):
                stream.carry_on(place, part)
        hidden = groups.join([stream.finish() for stream in streams])
        return torch.cat([hidden, owners.to(hidden.dtype).unsqueeze(1)], dim=1)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return logits `[rows, vocab]`, None where tensor parallelism leaves them to another process.

        Args:
            hidden_states: `[rows, hidden + 1]`.
        """
        # Clamped, since to measure memory vLLM asks for the logits of noise.
        owners = hidden_states[:, -1].round().long().clamp(0, len(self.experts) - 1)
        groups = Groups.of(owners)
        parts = [
            self.experts[expert].compute_logits(part[:, :-1].contiguous())
            for expert, part in zip(groups.experts, groups.split(hidden_states), strict=True)
        ]
        return None if any(part is None for part in parts) else groups.join(parts)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load all experts, one after another as their weights come; return the names of what was loaded.

        Args:
            weights: The first checkpoint's under their own names, then those of `secondary_weights` with prefixes.
        """
        loaded: set[str] = set()
        for index, own in groupby(weights, key=lambda weight: _expert_of(weight[0])):
            prefix = f"experts.{index}."
            names = self.experts[index].load_weights((name.removeprefix(prefix), tensor) for name, tensor in own)
            loaded |= {prefix + name for name in names}
        for expert, config in zip(self.experts, self._configs, strict=True):
            maybe_retie_word_embeddings(expert, config)
        return loaded

    def _owners(self, tokens: int) -> Tensor:
        """Return the expert of each token of the step that is being run, `[tokens]`."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # a step without requests
            return torch.zeros(tokens, dtype=torch.long)
        starts = metadata[self.experts[0].model.layers[0].self_attn.attn.layer_name].query_start_loc
        return self.rows.owners(starts.diff().tolist(), tokens)


class _Stream:
    """One expert's tokens on their way through its layers."""

    def __init__(self, model: Any, input_ids: Tensor, positions: Tensor) -> None:
        self.model = model
        self.positions = positions
        self.hidden: Tensor = model.embed_tokens(input_ids)
        self.residual: Tensor | None = None

    def project(self, place: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values `[tokens, heads * head size]` of a layer."""
        layer = self.model.layers[place]
        if self.residual is None:
            self.residual = self.hidden
            self.hidden = layer.input_layernorm(self.hidden)
        else:
            self.hidden, self.residual = layer.input_layernorm(self.hidden, self.residual)
        own = layer.self_attn
        projected, _ = own.qkv_proj(self.hidden)
        query, key, value = projected.split([own.q_size, own.kv_size, own.kv_size], dim=-1)
        query, key = own.rotary_emb(self.positions, query, key)
        return query, key, value

    def carry_on(self, place: int, attended: Tensor) -> None:
        """Take what a layer has attended to, `[tokens, heads * head size]`, through the rest of it."""
        layer = self.model.layers[place]
        self.hidden, _ = layer.self_attn.o_proj(attended)
        self.hidden, self.residual = layer.post_attention_layernorm(self.hidden, self.residual)
        self.hidden = layer.mlp(self.hidden)

    def finish(self) -> Tensor:
        """Return what the output head reads, `[tokens, hidden]`."""
        hidden: Tensor = self.model.norm(self.hidden, self.residual)[0]
        return hidden


def _own_config(shared: ModelConfig, directory: str) -> ModelConfig:
    """Return the engine's configuration with an expert's model in it.

    Raises:
        ValueError: if the expert takes shorter sequences than the engine.
    """
    own = copy.copy(shared)
    own.model = directory
    own.hf_config = own.hf_text_config = get_config(directory, trust_remote_code=False)
    own.word_embeddings_untied_by_checkpoint = False
    own.maybe_untie_word_embeddings()
    longest = own.hf_config.max_position_embeddings
    if longest < shared.max_model_len:
        raise ValueError(
            f"the expert {Path(directory).name} takes {longest} tokens; start the engine with --max-model-len {longest}"
        )
    return own


def _expert_of(name: str) -> int:
    """Return the expert that a weight belongs to; the first one's have no prefix."""
    first, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if first == "experts" else 0
