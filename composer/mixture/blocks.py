"""Mixtures of whole decoder layers: a model class of transformers, registered by `register`.

The first layers are those of a dense model; every later layer holds the same layer of all experts, and a gate. The
embedding, the final norm and the head are the dense model's. After Model-GLUE's block and model level (arXiv
2410.05357, section 3), with what they lack: keys and values are cached, a decision is kept for a whole answer, and
padding decides nothing.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from composer.errors import first_line
from composer.mixture.assembly import Donor, Part, assemble, made
from composer.mixture.gates import Gates
from composer.mixture.settings import LayerSettings
from composer.mixture.shapes import check_gates, check_level
from composer.zoo import Checkpoint
from composer.zoo.weights import TORCH_DTYPES

MODEL_TYPE = "composer_block_mixture"
_PREFIX = "language_model."
_OF_MIXTURE = re.compile(r"(?P<layers>.*\blayers)\.(?P<layer>\d+)\.(experts\.(?P<expert>\d+)|gate)\.(?P<rest>.+)")
"""The name of an expert's or a gate's tensor, within the language model."""


def register() -> None:
    """Tell transformers of the model class; a second call changes nothing."""
    AutoConfig.register(MODEL_TYPE, BlockMixtureConfig, exist_ok=True)
    AutoModelForCausalLM.register(BlockMixtureConfig, BlockMixtureForCausalLM, exist_ok=True)


@strict
class BlockMixtureConfig(PreTrainedConfig):  # type: ignore[misc]
    """What a mixture of decoder layers is made of."""

    model_type = MODEL_TYPE
    sub_configs: ClassVar[dict[str, Any]] = {"expert_config": AutoConfig}
    has_no_defaults_at_init: ClassVar[bool] = True

    expert_config: Any
    """The dense architecture's own configuration, which all experts share."""
    num_experts: int
    dense_layers: int = 0
    """The first layers, which are the dense model's alone."""
    num_experts_per_tok: int = 1
    routing: Literal["token", "sample"] = "sample"
    """Whether each token goes its own way, or all of an answer goes the way that its prompt decides."""
    shared_gate: bool = False
    """Whether one gate, before the first layer of experts, decides for all layers."""

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.expert_config, dict):
            self.expert_config = AutoConfig.for_model(**self.expert_config)
        # transformers ties the head of the whole model only if the outermost configuration says so.
        kwargs.setdefault("tie_word_embeddings", self.expert_config.tie_word_embeddings)
        super().__post_init__(**kwargs)
        layers = self.expert_config.num_hidden_layers
        if not 0 <= self.dense_layers < layers:
            raise ValueError(
                f"dense_layers is {self.dense_layers}; a mixture of {layers} layers takes 0 to {layers - 1}"
            )
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            asked = self.num_experts_per_tok
            raise ValueError(f"num_experts_per_tok is {asked}; with {self.num_experts} experts it is 1 to that many")

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """Return the configuration that has sizes and layers."""
        return self.expert_config


class MixtureCache(Cache):  # type: ignore[misc]
    """Keys and values of each expert of each layer, and what the gates decided.

    Experts that no row goes to have none, so a slot may be shorter than the text; the longest counts.

    Attributes:
        routes: The experts' shares by layer, `[batch, tokens or 1, experts]`. With sample routing, the decision that
            stands for as long as the cache is used; with token routing, that on the latest tokens.
        prompt: Which of the latest tokens decide, `[batch, tokens]`.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.routes: dict[int, Tensor] = {}
        self.prompt = torch.empty(0, 0, dtype=torch.bool)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens have been seen."""
        return max((layer.get_seq_length() for layer in self.layers), default=0)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the number of keys with `query_length` more, and the first one's place."""
        return self.get_seq_length() + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each row go on from the row `beam_idx` names."""
        super().reorder_cache(beam_idx)
        self.routes = {layer: shares.index_select(0, beam_idx) for layer, shares in self.routes.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        super().batch_repeat_interleave(repeats)
        self.routes = {layer: shares.repeat_interleave(repeats, dim=0) for layer, shares in self.routes.items()}

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        self.routes = {layer: shares[indices] for layer, shares in self.routes.items()}

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; what the prompt decided stays."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.routes = {}


def shares_of(logits: Tensor, top_k: int) -> Tensor:
    """Return each expert's share: softmax over all, the `top_k` largest, scaled to a sum of one.

    Args:
        logits: `[…, experts]`.
        top_k: How many experts have a share; a single one has exactly 1.
    """
    best, chosen = logits.softmax(dim=-1, dtype=torch.float32).topk(top_k, dim=-1)
    shares = torch.zeros_like(logits, dtype=torch.float32)
    return shares.scatter(-1, chosen, best / best.sum(dim=-1, keepdim=True))


def counted_tokens(input_ids: Tensor, mask: Tensor, config: Any) -> Tensor:
    """Return which tokens of a prompt a gate reads: no padding, and no token that begins or ends a text.

    Such tokens look alike whatever the text is, and a few massive dimensions of theirs drown all others in a mean.

    Args:
        input_ids: `[batch, tokens]`.
        mask: `[batch, tokens]`, of what is no padding.
        config: Names the special tokens.

    Returns:
        `[batch, tokens]`; a row of such tokens alone is counted whole.
    """
    special = [getattr(config, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")]
    flat = [one for each in special for one in (each if isinstance(each, list) else [each]) if one is not None]
    own = mask & ~torch.isin(input_ids, torch.tensor(flat, dtype=input_ids.dtype, device=input_ids.device))
    return torch.where(own.any(dim=1, keepdim=True), own, mask)


def prompt_mean(states: Tensor, counted: Tensor) -> Tensor:
    """Return the mean state of the tokens that are counted, `[batch, hidden]`, float32.

    Args:
        states: `[batch, tokens, hidden]`.
        counted: `[batch, first tokens]`.
    """
    own = states[:, : counted.shape[1]].float().masked_fill(~counted[..., None], 0)
    return own.sum(dim=1) / counted.sum(dim=1, keepdim=True).clamp_min(1)


def positions_of(attention_mask: Tensor, count: int) -> Tensor:
    """Return the positions of the last `count` tokens, counted without padding, `[batch, count]`."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp_min(0)[:, -count:]


class MixtureLayer(nn.Module):
    """A layer of all experts, in the place of a decoder layer."""

    def __init__(self, config: BlockMixtureConfig, index: int, dense: nn.Module) -> None:
        """Build the layer, without weights.

        Args:
            config: The mixture's.
            index: Its number in the model.
            dense: The decoder layer whose place it takes.
        """
        super().__init__()
        expert_config, count = config.expert_config, config.num_experts
        build: Any = type(dense)
        self.experts = nn.ModuleList(build(expert_config, index) for _ in range(count))
        first_slot = config.dense_layers + (index - config.dense_layers) * count
        for number, expert in enumerate(self.experts):
            cast(Any, expert.self_attn).layer_idx = first_slot + number  # its place in the cache
        self.deciding = config.dense_layers if config.shared_gate else index
        """The layer whose gate decides."""
        self.gate = nn.Linear(expert_config.hidden_size, count) if self.deciding == index else None
        self.by_token, self.top_k = config.routing == "token", config.num_experts_per_tok
        if hasattr(dense, "attention_type"):  # some models choose a layer's mask by it
            self.attention_type = dense.attention_type

    def forward(self, hidden_states: Tensor, *args: Any, past_key_values: MixtureCache, **kwargs: Any) -> Tensor:
        """Return the weighted sum of the experts' outputs, `[batch, tokens, hidden]`.

        With token routing all experts read all tokens: a token that comes to an expert attends to keys and values
        that this expert made of all earlier tokens. With sample routing only experts with a share in some row run.
        """
        if self.gate is not None:
            self._decide(hidden_states, past_key_values)
        shares = past_key_values.routes[self.deciding]
        needed = [True] * len(self.experts) if self.by_token else (shares > 0).flatten(0, 1).any(dim=0).tolist()
        result = torch.zeros_like(hidden_states, dtype=torch.float32)
        for expert, share, runs in zip(self.experts, shares.unbind(dim=-1), needed, strict=True):
            if runs:
                output = expert(hidden_states, *args, past_key_values=past_key_values, **kwargs)
                share = share[..., None]
                # Where it has no share an expert may overflow, and zero times infinity is no number.
                result = torch.where(share > 0, result + share * output, result)
        return result.to(hidden_states.dtype)

    def _decide(self, hidden_states: Tensor, cache: MixtureCache) -> None:
        if self.by_token:
            cache.routes[self.deciding] = shares_of(self._logits(hidden_states), self.top_k)
        elif self.deciding not in cache.routes:
            mean = prompt_mean(hidden_states, cache.prompt)[:, None]
            cache.routes[self.deciding] = shares_of(self._logits(mean), self.top_k)

    def _logits(self, states: Tensor) -> Tensor:
        gate = cast(nn.Linear, self.gate)
        return nn.functional.linear(states.float(), gate.weight.float(), gate.bias.float())


class RoutedByPrompt:
    """Generation of what is routed by its prompt; keeps a cache of its own kind."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        # Without a cache the whole text is read anew for each token, and still only the prompt decides.
        if model_kwargs.get("prompt_mask") is None:
            model_kwargs["prompt_mask"] = model_kwargs.get("attention_mask")
        updated: dict[str, Any] = super()._update_model_kwargs_for_generation(  # type: ignore[misc]
            outputs, model_kwargs, *args, **kwargs
        )
        return updated


class BlockMixtureForCausalLM(RoutedByPrompt, PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A causal language model whose later layers are layers of all experts.

    It is the dense architecture's own model with these layers put in, so that masks, positions and whatever else an
    architecture does between its layers are its own.

    With sample routing, the prompt of a forward pass without a cache is all of it, or what `prompt_mask` says;
    with a cache it is what the first pass reads. A prompt must therefore be read in one pass: if it comes in chunks
    (`prefill_chunk_size`), the first decides; and an answer that goes on from an old cache keeps the old decision.
    """

    config: BlockMixtureConfig
    config_class = BlockMixtureConfig
    base_model_prefix = "language_model"
    _supports_sdpa = True
    _supports_flash_attn = True
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["gate.weight", "gate.bias"]

    def __init__(self, config: BlockMixtureConfig) -> None:
        super().__init__(config)
        self.language_model = AutoModelForCausalLM.from_config(config.expert_config, dtype=torch.get_default_dtype())
        layers = self.language_model.base_model.layers
        for index in range(config.dense_layers, len(layers)):
            layers[index] = MixtureLayer(config, index, layers[index])
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of tokens."""
        return cast(nn.Module, self.language_model.get_input_embeddings())

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return cast(nn.Module, self.language_model.get_output_embeddings())

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MixtureCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        prompt_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits, `[batch, tokens, vocabulary]`.

        Args:
            input_ids: `[batch, tokens]`, of which the cache knows none.
            attention_mask: `[batch, known and new tokens]`, 0 for padding on either side.
            position_ids: `[batch, tokens]`; by default counted without padding.
            past_key_values: What an earlier pass returned.
            inputs_embeds: `[batch, tokens, hidden]`, in the place of tokens.
            use_cache: Whether to return a cache.
            logits_to_keep: For how many of the last tokens, or which ones; 0 for all.
            prompt_mask: The tokens that decide with sample routing, `[batch, first tokens]`; by default all that are
                no padding. Only asked where the cache holds no decision yet.
            **kwargs: For the dense architecture's model, e.g. `labels`.
        """
        if kwargs.get("output_hidden_states") or kwargs.get("output_attentions"):
            raise ValueError("a mixture of blocks returns no hidden states and no attentions; hook its layers")
        cache = MixtureCache() if past_key_values is None else past_key_values
        if not isinstance(cache, MixtureCache):
            raise ValueError(f"past_key_values is a {type(cache).__name__}; a mixture of blocks takes a MixtureCache")
        given = cast(Tensor, inputs_embeds if input_ids is None else input_ids)
        if attention_mask is not None and position_ids is None:
            position_ids = positions_of(attention_mask, given.shape[1])
        deciding = attention_mask if prompt_mask is None else prompt_mask
        if deciding is None:
            deciding = torch.ones(given.shape[:2], device=given.device)
        cache.prompt = deciding.bool()
        if input_ids is not None and not cache.routes and cache.prompt.shape[1] <= input_ids.shape[1]:
            own = input_ids[:, : cache.prompt.shape[1]]
            cache.prompt = counted_tokens(own, cache.prompt, self.config.expert_config)
        outputs = self.language_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,  # even where none is asked for: it is what carries the decisions
            inputs_embeds=inputs_embeds,
            use_cache=True,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        keep = self.config.expert_config.use_cache if use_cache is None else use_cache
        return CausalLMOutputWithPast(loss=outputs.loss, logits=outputs.logits, past_key_values=cache if keep else None)


def build_blocks(
    experts: Sequence[Checkpoint], dense: Checkpoint, gates: Gates, settings: LayerSettings, directory: Path
) -> dict[str, str]:
    """Write a mixture of the experts' layers in a dense model.

    Args:
        experts: In the order of the gates.
        dense: Gives the dense layers, embedding, final norm and head.
        gates: Kept in float32, whatever the type of the rest.
        settings: How they are mixed.
        directory: Where it is written; exists and is empty.

    Returns:
        sha256 of each weight file.

    Raises:
        RecipeError: if the models do not fit, or the settings do not fit them.
        ZooError: if a tensor cannot be read.
    """
    check_level("block", experts, dense)
    check_gates(gates, len(experts), dense, settings)
    model = _unmade(dense, len(experts), settings)
    parts = dict(_parts(model, Donor(dense), [Donor(expert) for expert in experts], gates))
    config = model.config
    config.architectures = [type(model).__name__]
    config.expert_config.dtype = TORCH_DTYPES[dense.dtype]
    return assemble(parts, dense, config, directory)


def unsupported(dense: Checkpoint) -> str | None:
    """Return why a mixture cannot be built of a model's layers, or None; found by building one without weights."""
    if dense.remote_code:
        return "the model brings Python code of its own"
    try:
        model = _unmade(dense, 2, LayerSettings(top_k=2))
        text = torch.zeros(1, 3, dtype=torch.long, device="meta")
        cache = model(input_ids=text, use_cache=True).past_key_values
    except Exception as error:  # another layout makes it stumble over anything
        return f"{dense.architecture} is laid out otherwise ({first_line(error)})"
    if [layer.get_seq_length() for layer in cache.layers] != [3] * 2 * (dense.layers or 0):
        return f"{dense.architecture} keeps keys and values otherwise"
    return None


def _unmade(dense: Checkpoint, experts: int, settings: LayerSettings) -> BlockMixtureForCausalLM:
    """Return a mixture without weights."""
    config = BlockMixtureConfig(
        expert_config=json.loads((Path(dense.home) / "config.json").read_text()),
        num_experts=experts,
        dense_layers=settings.dense_layers,
        num_experts_per_tok=settings.top_k,
        routing=settings.routing,
        shared_gate=settings.shared_gate,
    )
    with torch.device("meta"), no_init_weights():
        model = BlockMixtureForCausalLM(config)
    model.eval()
    return model


def _parts(
    model: BlockMixtureForCausalLM, dense: Donor, experts: list[Donor], gates: Gates
) -> Iterator[tuple[str, Part]]:
    """Yield all tensors of a mixture by name."""
    first = model.config.dense_layers
    for name in model.state_dict():
        if name in model.all_tied_weights_keys:
            continue
        plain = name.removeprefix(_PREFIX)
        found = _OF_MIXTURE.fullmatch(plain)
        if found is None:
            yield name, dense.part(plain)
        elif found["expert"] is not None:
            original = f"{found['layers']}.{found['layer']}.{found['rest']}"
            yield name, experts[int(found["expert"])].part(original)
        else:
            row = int(found["layer"]) - first
            bias = gates.weight.new_zeros(gates.weight.shape[:2]) if gates.bias is None else gates.bias
            yield name, made((gates.weight if found["rest"] == "weight" else bias)[row], "F32")
