"""Mixtures of feed-forward parts, written as ordinary checkpoints of transformers that engines know.

Attention, norms, embedding and head are the dense model's, the feed-forward parts (MLPs) the experts'. After
Model-GLUE's FFN level (arXiv 2410.05357, section 3). Which architecture is written:

- `mixtral`, where all layers are sparse and attention has no biases;
- `qwen2_moe` else: it may begin with dense layers, and has biases. vLLM gives it heads of the hidden size divided by
  their number, whatever the configuration says, so models with other heads only run in transformers.
- `qwen3_moe`, for experts that normalise queries and keys.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from composer.errors import RecipeError
from composer.mixture.assembly import Donor, Part, assemble, made
from composer.mixture.gates import Gates
from composer.mixture.settings import LayerSettings
from composer.mixture.shapes import check_gates, check_level
from composer.zoo import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

Form = Literal["mixtral", "qwen2_moe", "qwen3_moe"]

SHARED_EXPERT = 16
"""Size of the expert of zeros that `qwen2_moe` adds to every token. Without any, transformers would report tensors
missing; engines split it over as many GPUs as they are given."""

_KEPT = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "tie_word_embeddings",
    "rope_parameters", "sliding_window", "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip
"""What the dense model's configuration and the mixture's call alike."""
_MIXTRAL_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def build_ffn(
    experts: Sequence[Checkpoint], dense: Checkpoint, gates: Gates, settings: LayerSettings, directory: Path
) -> dict[str, str]:
    """Write a mixture of the experts' MLPs around a dense model.

    Args:
        experts: In the order of the gates.
        dense: Gives all but the sparse layers' MLPs.
        gates: `[sparse layers, experts, hidden]`, without bias.
        settings: Routing must be by token, with a gate for each layer.
        directory: Where it is written; exists and is empty.

    Returns:
        sha256 of each weight file.

    Raises:
        RecipeError: if the models do not fit, or the settings ask for what no engine knows.
        ZooError: if a tensor cannot be read.
    """
    if settings.routing != "token" or settings.shared_gate:
        raise RecipeError(
            "mixture.level: ffn routes each token by a gate of each layer; for routing: sample or one gate for all "
            "layers take mixture.level: block"
        )
    check_level("ffn", experts, dense)
    check_gates(gates, len(experts), dense, settings)
    if gates.bias is not None and bool(gates.bias.any()):
        raise ValueError("gates at FFN level have no bias")
    form = form_of(dense, settings.dense_layers)
    if form == "qwen2_moe" and dense.architecture == "MistralForCausalLM" and _window(dense):
        raise RecipeError(
            f"mixture.dense_layers: '{dense.id}' attends to a window of {_window(dense)} tokens, which what has dense "
            "layers does otherwise; mixture.dense_layers: 0 works, and so does mixture.level: block"
        )
    donor, donors = Donor(dense), [Donor(expert) for expert in experts]
    parts = dict(_parts(form, donor, donors, gates.weight, settings.dense_layers))
    return assemble(parts, dense, _config(form, experts, dense, settings), directory)


def _window(dense: Checkpoint) -> int | None:
    from transformers import AutoConfig

    return getattr(AutoConfig.from_pretrained(dense.home, local_files_only=True), "sliding_window", None)


def form_of(dense: Checkpoint, dense_layers: int) -> Form:
    """Return the architecture that a mixture around a dense model has."""
    if dense.architecture == "Qwen3ForCausalLM":
        return "qwen3_moe"
    return "qwen2_moe" if dense_layers or dense.architecture == "Qwen2ForCausalLM" else "mixtral"


def _parts(form: Form, dense: Donor, experts: list[Donor], gates: "Tensor", first: int) -> Iterator[tuple[str, Part]]:
    """Yield the mixture's tensors by name, layer by layer; `first` is the first sparse one."""
    import torch

    hidden = int(gates.shape[2])
    yield "model.embed_tokens.weight", dense.part("model.embed_tokens.weight")
    for layer in range(first + len(gates)):
        at = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}.{norm}.weight", dense.part(f"{at}.{norm}.weight")
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weight = dense.part(f"{at}.self_attn.{name}.weight")
            yield f"{at}.self_attn.{name}.weight", weight
            bias = f"{at}.self_attn.{name}.bias"
            if bias in dense:
                yield bias, dense.part(bias)
            elif form == "qwen2_moe" and name != "o_proj":  # whose engines want biases of their own
                yield bias, made(torch.zeros(weight.shape[0]))
        if form == "qwen3_moe":
            for norm in ("q_norm", "k_norm"):
                yield f"{at}.self_attn.{norm}.weight", dense.part(f"{at}.self_attn.{norm}.weight")
        if layer < first:
            for name in _MIXTRAL_NAMES:
                yield f"{at}.mlp.{name}.weight", dense.part(f"{at}.mlp.{name}.weight")
            continue
        block = f"{at}.block_sparse_moe" if form == "mixtral" else f"{at}.mlp"
        yield f"{block}.gate.weight", made(gates[layer - first])
        for number, expert in enumerate(experts):
            for name, short in _MIXTRAL_NAMES.items():
                own = short if form == "mixtral" else name
                yield f"{block}.experts.{number}.{own}.weight", expert.part(f"{at}.mlp.{name}.weight")
        if form == "qwen2_moe":
            yield f"{block}.shared_expert_gate.weight", made(torch.zeros(1, hidden))
            for name in ("gate_proj", "up_proj"):
                yield f"{block}.shared_expert.{name}.weight", made(torch.zeros(SHARED_EXPERT, hidden))
            yield f"{block}.shared_expert.down_proj.weight", made(torch.zeros(hidden, SHARED_EXPERT))
    yield "model.norm.weight", dense.part("model.norm.weight")
    if "lm_head.weight" in dense:
        yield "lm_head.weight", dense.part("lm_head.weight")


def _config(form: Form, experts: Sequence[Checkpoint], dense: Checkpoint, settings: LayerSettings) -> Any:
    from transformers import AutoConfig

    origin = AutoConfig.from_pretrained(dense.home, local_files_only=True)
    kept = {key: getattr(origin, key) for key in _KEPT if hasattr(origin, key)}
    size = experts[0].intermediate_size
    if form == "mixtral":
        own: dict[str, Any] = {"intermediate_size": size, "num_local_experts": len(experts)}
    else:
        own = {
            "intermediate_size": dense.intermediate_size,
            "moe_intermediate_size": size,
            "num_experts": len(experts),
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(range(settings.dense_layers)),
        }
    if form == "qwen2_moe":
        own |= {"shared_expert_intermediate_size": SHARED_EXPERT, "qkv_bias": True}
    architecture = {"mixtral": "Mixtral", "qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe"}[form]
    config = AutoConfig.for_model(
        form, architectures=[f"{architecture}ForCausalLM"], num_experts_per_tok=settings.top_k, **kept, **own
    )
    if form != "mixtral":
        config.sliding_window = None  # which transformers makes 0 where there is none
    return config
