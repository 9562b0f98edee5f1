"""Which models fit into one: what must agree before layers, or parts of layers, of several stand side by side."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from composer.errors import RecipeError
from composer.mixture.gates import Gates, Level
from composer.mixture.settings import LayerSettings
from composer.similarity.gate import difference
from composer.zoo import Checkpoint, open_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FFN_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""What has a sparse counterpart that transformers and engines know."""

_ANY = "mixture.level: model works for any models"
_PLAIN_LAYER = re.compile(
    r"\.(input_layernorm\.weight|post_attention_layernorm\.weight|self_attn\.rotary_emb\.inv_freq|"
    r"self_attn\.([qkv]_proj\.(weight|bias)|o_proj\.weight|[qk]_norm\.weight)|mlp\.(gate|up|down)_proj\.weight)$"
)


def check_level(level: Level, experts: Sequence[Checkpoint], dense: Checkpoint) -> None:
    """Check that models can be mixed inside one.

    Args:
        level: Where they are to be mixed.
        experts: The experts.
        dense: Gives what is not theirs.

    Raises:
        RecipeError: naming the first property that stands against it, and what would work.
    """
    for expert in experts:
        found = difference(dense, expert, layers_only=True)
        if found is not None:
            raise RecipeError(f"mixture.level: {level} cannot mix '{expert.id}' into '{dense.id}': {found}; {_ANY}")
    if level == "ffn":
        reason = _not_for_ffn(dense)
        if reason is not None:
            raise RecipeError(
                f"mixture.level: ffn has no sparse architecture for '{dense.id}': {reason}; "
                f"mixture.level: block may do, {_ANY}"
            )
        return
    from composer.mixture.blocks import unsupported

    reason = unsupported(dense)
    if reason is not None:
        raise RecipeError(f"mixture.level: block cannot be built of layers of '{dense.id}': {reason}; {_ANY}")


def check_tokenizers(experts: Sequence[Checkpoint], top_k: int) -> None:
    """Check that whole models can answer together: that their distributions are over the same tokens.

    Raises:
        RecipeError: naming two that are not, and what would work.
    """
    if top_k > len(experts):
        raise RecipeError(f"mixture.top_k: {top_k}, but there are only {len(experts)} experts")
    first = experts[0]
    for one in experts:
        found = None
        if one.remote_code:
            found = "it brings Python code of its own"
        elif one.quantisation:
            found = f"it is stored quantised ({one.quantisation})"
        elif _tokens(one) != _tokens(first):
            found = "another tokenizer"
        elif one.vocabulary_size != first.vocabulary_size:
            found = f"another vocabulary size ({one.vocabulary_size}, {first.vocabulary_size})"
        if found is not None:
            raise RecipeError(
                f"mixture.top_k: {top_k} averages distributions over tokens, and '{one.id}' does not go with "
                f"'{first.id}': {found}; mixture.top_k: 1 works for any models"
            )


def reads(checkpoint: Checkpoint) -> bool:
    """Return whether a model's first layers can be run alone; found by building it without weights."""
    import json

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.for_model(**json.loads((Path(checkpoint.home) / "config.json").read_text()))
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(config).base_model
    except Exception:  # whatever a configuration makes transformers stumble over
        return False
    return hasattr(base, "layers") and hasattr(base, "norm")


def check_gates(gates: Gates, experts: int, dense: Checkpoint, settings: LayerSettings) -> None:
    """Check settings against models, and gates against both.

    Raises:
        RecipeError: if there are fewer layers or experts than the settings ask for.
        ValueError: if the gates are of another shape.
    """
    layers = dense.layers or 0
    if settings.dense_layers >= layers:
        raise RecipeError(
            f"mixture.dense_layers: {settings.dense_layers} leaves no layer to the experts; "
            f"'{dense.id}' has {layers}, so give at most {layers - 1}"
        )
    if settings.top_k > experts:
        raise RecipeError(f"mixture.top_k: {settings.top_k}, but there are only {experts} experts")
    sparse = 1 if settings.shared_gate else layers - settings.dense_layers
    wanted = (sparse, experts, dense.hidden_size)
    if tuple(gates.weight.shape) != wanted:
        raise ValueError(f"gates of shape {tuple(gates.weight.shape)} where {wanted} is due")
    if gates.bias is not None and tuple(gates.bias.shape) != wanted[:2]:
        raise ValueError(f"biases of gates of shape {tuple(gates.bias.shape)} where {wanted[:2]} is due")


def _not_for_ffn(dense: Checkpoint) -> str | None:
    """Return what keeps a model from having a sparse counterpart, or None."""
    from transformers import AutoConfig

    if dense.architecture not in FFN_ARCHITECTURES:
        known = ", ".join(name.removesuffix("ForCausalLM") for name in FFN_ARCHITECTURES)
        return f"its architecture is {dense.architecture} (there are ones for {known})"
    for name in open_weights(dense.source, Path(dense.home)).headers:
        biased = dense.architecture != "Qwen2ForCausalLM" and name.endswith("_proj.bias")
        if ".layers." in name and (biased or not _PLAIN_LAYER.search(name)):
            return f"it has a tensor that there is no place for, {name}"
    config = AutoConfig.from_pretrained(dense.home, local_files_only=True)
    if config.hidden_act != "silu":
        return f"engines only know hidden_act silu there, and its is {config.hidden_act}"
    return _sliding(config)


def _sliding(config: "PretrainedConfig") -> str | None:
    """Return in words that a model attends to a window only, which sparse Qwen models do otherwise."""
    if config.model_type != "mistral" and "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        return f"it attends to a window of {config.sliding_window} tokens in some layers"
    return None


def _tokens(one: Checkpoint) -> tuple[str, str]:
    return one.tokenizer.vocabulary, one.tokenizer.added_tokens
