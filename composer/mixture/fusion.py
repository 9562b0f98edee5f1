"""Mixtures of whole models whose answers are fused token by token: a model class of transformers.

A gate decides by the prompt how much each expert counts; for every token, the experts' distributions are averaged with
these shares (as in UltraFuser, arXiv 2403.08281, with one decision for a whole answer). Experts may have any
architecture and size, and must share a tokenizer. Each keeps keys and values of its own. With one expert it is that
expert.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from composer.mixture.assembly import Donor, Part, assemble, made
from composer.mixture.blocks import RoutedByPrompt, counted_tokens, positions_of, prompt_mean, shares_of
from composer.mixture.shapes import check_tokenizers
from composer.zoo import Checkpoint
from composer.zoo.weights import TORCH_DTYPES

MODEL_TYPE = "composer_model_mixture"


def register() -> None:
    """Tell transformers of the model class; a second call changes nothing."""
    AutoConfig.register(MODEL_TYPE, ModelMixtureConfig, exist_ok=True)
    AutoModelForCausalLM.register(ModelMixtureConfig, ModelMixtureForCausalLM, exist_ok=True)


@strict
class ModelMixtureConfig(PreTrainedConfig):  # type: ignore[misc]
    """What a mixture of whole models is made of."""

    model_type = MODEL_TYPE
    has_no_defaults_at_init: ClassVar[bool] = True

    experts: Any
    """The experts' own configurations."""
    encoder: int = 0
    """The expert whose first layers read the prompt."""
    encoder_layers: int = 0
    """How many of its layers."""
    num_experts_per_tok: int = 1
    max_position_embeddings: int | None = None
    """What the shortest expert reads."""
    vocab_size: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.experts = [AutoConfig.for_model(**one) if isinstance(one, dict) else one for one in self.experts]
        kwargs.setdefault("tie_word_embeddings", False)
        super().__post_init__(**kwargs)
        if not 1 <= self.num_experts_per_tok <= len(self.experts):
            asked = self.num_experts_per_tok
            raise ValueError(f"num_experts_per_tok is {asked}; with {len(self.experts)} experts it is 1 to that many")

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """Return the configuration that has sizes and layers: the largest expert's."""
        return max(self.experts, key=lambda one: one.hidden_size * one.num_hidden_layers)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as plain data."""
        plain: dict[str, Any] = super().to_dict()
        return {**plain, "experts": [one.to_dict() for one in self.experts]}


class FusedCache(Cache):  # type: ignore[misc]
    """The experts' caches, and the shares that the prompt decided.

    Attributes:
        experts: One cache for each; an expert that no row needs has an empty one.
        shares: `[batch, experts]`, once it is decided.
    """

    def __init__(self, count: int) -> None:
        super().__init__(layers=[])
        self.experts = [DynamicCache() for _ in range(count)]
        self.shares: Tensor | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens have been seen."""
        return max(int(one.get_seq_length()) for one in self.experts)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the number of keys with `query_length` more, and the first one's place."""
        return self.get_seq_length() + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each row go on from the row `beam_idx` names."""
        self._each(lambda cache: cache.reorder_cache(beam_idx), lambda shares: shares.index_select(0, beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._each(
            lambda cache: cache.batch_repeat_interleave(repeats), lambda shares: shares.repeat_interleave(repeats, 0)
        )

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._each(lambda cache: cache.batch_select_indices(indices), lambda shares: shares[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; what the prompt decided stays."""
        self._each(lambda cache: cache.crop(tokens_to_remove), lambda shares: shares)

    def _each(self, change: Any, share: Any) -> None:
        for cache in self.experts:
            if cache.get_seq_length():
                change(cache)
        if self.shares is not None:
            self.shares = share(self.shares)


class _Enough(Exception):  # noqa: N818 - it is no error
    """Carries the hidden states that were wanted out of a forward pass that need not go on."""

    def __init__(self, states: Tensor) -> None:
        self.states = states


class ModelMixtureForCausalLM(RoutedByPrompt, PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A causal language model that averages the next-token distributions of several.

    The prompt of a forward pass without a cache is all of it, or what `prompt_mask` says; with a cache it is what the
    first pass reads, which must hold the whole prompt.
    """

    config: ModelMixtureConfig
    config_class = ModelMixtureConfig
    base_model_prefix = "none"
    _supports_sdpa = True
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["gate.weight", "gate.bias"]

    def __init__(self, config: ModelMixtureConfig) -> None:
        super().__init__(config)
        dtype = torch.get_default_dtype()
        self.experts = nn.ModuleList(AutoModelForCausalLM.from_config(one, dtype=dtype) for one in config.experts)
        self.gate = nn.Linear(config.experts[config.encoder].hidden_size, len(config.experts))
        self.post_init()
        # transformers looks for tied heads in direct children only, and these are in a list.
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)

    def get_input_embeddings(self) -> nn.Module:
        """Return the encoder's embedding of tokens."""
        return cast(nn.Module, cast(Any, self.experts[self.config.encoder]).get_input_embeddings())

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: FusedCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        prompt_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute log-probabilities, `[batch, tokens, vocabulary]`; an expert alone gives its own logits.

        Args:
            input_ids: `[batch, tokens]`, of which the cache knows none.
            attention_mask: `[batch, known and new tokens]`, 0 for padding on either side.
            position_ids: `[batch, tokens]`; by default counted without padding.
            past_key_values: What an earlier pass returned.
            use_cache: Whether to return a cache.
            logits_to_keep: For how many of the last tokens, or which ones; 0 for all.
            prompt_mask: The tokens that decide, `[batch, first tokens]`; by default all that are no padding.
            **kwargs: For the experts.
        """
        cache = FusedCache(len(self.experts)) if past_key_values is None else past_key_values
        if not isinstance(cache, FusedCache):
            raise ValueError(f"past_key_values is a {type(cache).__name__}; a mixture of models takes a FusedCache")
        if attention_mask is not None and position_ids is None:
            position_ids = positions_of(attention_mask, input_ids.shape[1])
        if cache.shares is None:
            cache.shares = self._decide(input_ids, attention_mask, position_ids, prompt_mask)
        shares = cache.shares.to(input_ids.device)
        mixed: Tensor | None = None
        alone = torch.zeros(())
        for number, expert in enumerate(self.experts):
            share = shares[:, number, None, None]
            if not bool((share > 0).any()):
                continue
            logits = expert(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache.experts[number],
                use_cache=True,
                logits_to_keep=logits_to_keep,
                **{key: value for key, value in kwargs.items() if key != "labels"},
            ).logits.float()
            if mixed is None:
                mixed, alone = logits.new_full(logits.shape, -torch.inf), torch.zeros_like(logits)
            own = torch.where(share > 0, share.log() + logits.log_softmax(dim=-1), -torch.inf)
            mixed, alone = torch.logaddexp(mixed, own), torch.where(share == 1, logits, alone)
        assert mixed is not None  # noqa: S101 - shares add up to one
        lonely = (shares == 1).any(dim=1)[:, None, None]
        result = torch.where(lonely, alone, mixed)
        loss = None
        if kwargs.get("labels") is not None:
            loss = self.loss_function(logits=result, labels=kwargs["labels"], vocab_size=result.shape[-1])
        kept = None if use_cache is False else cache
        return CausalLMOutputWithPast(loss=loss, logits=result, past_key_values=kept)

    def _decide(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, prompt_mask: Tensor | None
    ) -> Tensor:
        if len(self.experts) == 1:
            return torch.ones(input_ids.shape[0], 1, device=input_ids.device)
        expert, config = cast(Any, self.experts[self.config.encoder]), self.config.experts[self.config.encoder]
        if prompt_mask is None:
            prompt_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        counted = counted_tokens(input_ids[:, : prompt_mask.shape[1]], prompt_mask.bool(), config)
        base = expert.base_model
        layers = base.layers
        following = layers[self.config.encoder_layers] if self.config.encoder_layers < len(layers) else base.norm

        def stop(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            raise _Enough(arguments[0] if arguments else named["hidden_states"])

        hook = following.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            base(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)
            raise RuntimeError("the encoder's layers were not reached")
        except _Enough as found:
            states = found.states
        finally:
            hook.remove()
        mean = prompt_mean(states, counted)
        scores = nn.functional.linear(mean, self.gate.weight.float(), self.gate.bias.float())
        return shares_of(scores, self.config.num_experts_per_tok)


def build_fusion(
    experts: Sequence[Checkpoint],
    encoder: int,
    layers: int,
    weight: Tensor,
    bias: Tensor,
    directory: Path,
    *,
    top_k: int,
) -> dict[str, str]:
    """Write whole models as one whose next-token distributions are averaged.

    Args:
        experts: In the order of the gate.
        encoder: Number of the expert whose first layers read the prompt.
        layers: How many of its layers.
        weight: The gate, `[experts, hidden]`.
        bias: `[experts]`.
        directory: Where it is written; exists and is empty.
        top_k: Experts that answer one prompt.

    Returns:
        sha256 of each weight file.

    Raises:
        RecipeError: if experts have different tokenizers.
        ZooError: if a tensor cannot be read.
    """
    check_tokenizers(experts, top_k)
    configs = []
    parts: dict[str, Part] = {"gate.weight": made(weight, "F32"), "gate.bias": made(bias, "F32")}
    for number, expert in enumerate(experts):
        donor = Donor(expert)
        for name in donor.weights.headers:
            parts[f"experts.{number}.{name}"] = donor.part(name, keep=True)
        config = json.loads((Path(expert.home) / "config.json").read_text())
        configs.append({**config, "dtype": TORCH_DTYPES[expert.dtype]})
    config = ModelMixtureConfig(
        experts=configs,
        encoder=encoder,
        encoder_layers=layers,
        num_experts_per_tok=top_k,
        architectures=[ModelMixtureForCausalLM.__name__],
        max_position_embeddings=min((one.context_length for one in experts if one.context_length), default=None),
        vocab_size=experts[0].vocabulary_size,
    )
    first = AutoConfig.from_pretrained(experts[encoder].home, local_files_only=True)
    config.bos_token_id, config.pad_token_id = first.bos_token_id, first.pad_token_id
    config.eos_token_id = _ends(experts)
    return assemble(parts, experts[encoder], config, directory)


def _ends(experts: Sequence[Checkpoint]) -> list[int] | None:
    """Return the tokens that end an answer of any of the experts."""
    found: list[int] = []
    for one in experts:
        own = AutoConfig.from_pretrained(one.home, local_files_only=True).eos_token_id
        found += own if isinstance(own, list) else [own] if own is not None else []
    return sorted(set(found)) or None
