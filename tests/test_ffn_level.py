"""Mixtures of MLPs: ordinary checkpoints that compute what a mixture of MLPs is, in transformers and in vLLM."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from composer.artefacts import Store
from composer.errors import RecipeError
from composer.mixture.ffn import build_ffn, form_of
from composer.mixture.gates import Gates, gate_inputs
from composer.mixture.settings import LayerSettings
from composer.mixture.shapes import check_level
from composer.serving.engines import ENGINES, EngineSettings
from composer.zoo import Checkpoint, inspect_checkpoint
from tests.mixtures import TEXTS, TINY, answers, batch_of, close, load, logits, made_of

Zoo = dict[str, Checkpoint]

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {"sliding_window": 4, "head_dim": 32}),
    "llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
            "max_position_embeddings": 512,
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 32}),
}
"""Architectures besides those of the quickstart, with heads, windows, positions or untied heads of their own."""

CASES = {
    "llama": ("stories", "stories-math", "stories-law", 0, "mixtral"),
    "llama-hybrid": ("stories", "stories-math", "stories-law", 2, "qwen2_moe"),
    "qwen2": ("script", "script-code", "script-play", 0, "qwen2_moe"),
    "qwen2-hybrid": ("script", "script-code", "script-play", 1, "qwen2_moe"),
    "mistral": ("mistral-0", "mistral-1", "mistral-2", 0, "mixtral"),
    "llama3": ("llama3-0", "llama3-1", "llama3-2", 0, "mixtral"),
    "qwen3-hybrid": ("qwen3-0", "qwen3-1", "qwen3-2", 1, "qwen3_moe"),
}
cases = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def zoo(quick: Zoo, tmp_path_factory: pytest.TempPathFactory, shared_store: Store) -> Zoo:
    from transformers import AutoConfig

    root = tmp_path_factory.mktemp("tiny")
    made = {}
    for name, (kind, own) in KINDS.items():
        for seed in range(3):
            config = AutoConfig.for_model(kind, **TINY, **own)
            made[f"{name}-{seed}"] = made_of(config, root / f"{name}-{seed}", shared_store, seed)
    return {**quick, **made}


class Mixed(nn.Module):
    """What a mixture of MLPs is, computed plainly."""

    def __init__(self, mlps: list[nn.Module], gate: Tensor, top_k: int) -> None:
        super().__init__()
        self.mlps, self.gate, self.top_k = nn.ModuleList(mlps), gate, top_k

    def forward(self, states: Tensor) -> Tensor:
        best, chosen = (states @ self.gate.T).softmax(dim=-1).topk(self.top_k, dim=-1)
        best = best / best.sum(dim=-1, keepdim=True)
        outputs = torch.stack([mlp(states) for mlp in self.mlps], dim=-2)
        return (outputs.gather(-2, chosen[..., None].expand(*chosen.shape, states.shape[-1])) * best[..., None]).sum(-2)


def reference(experts: list[Checkpoint], dense: Checkpoint, gates: Tensor, first: int, top_k: int) -> Any:
    """Return the dense model with mixtures of the experts' MLPs in its layers."""
    model, others = load(dense.path), [load(one.path) for one in experts]
    for index in range(first, len(model.model.layers)):
        mlps = [one.model.layers[index].mlp for one in others]
        model.model.layers[index].mlp = Mixed(mlps, gates[index - first], top_k)
    return model


def some_gates(dense: Checkpoint, experts: int, first: int) -> Tensor:
    """Return gates without meaning, as they come back from the storage type."""
    torch.manual_seed(2)
    gates = torch.randn((dense.layers or 0) - first, experts, dense.hidden_size or 0)
    return gates.bfloat16().float() if dense.dtype == "BF16" else gates


def build(
    experts: list[Checkpoint], dense: Checkpoint, gates: Tensor, directory: Path, first: int = 0, top_k: int = 1
) -> Any:
    """Write and load a mixture; nothing may be missing or left over."""
    from transformers import AutoModelForCausalLM

    directory.mkdir(exist_ok=True)
    build_ffn(experts, dense, Gates(gates), LayerSettings(dense_layers=first, top_k=top_k), directory)
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    return model.eval()


@cases
@pytest.mark.parametrize("top_k", [1, 2])
def test_it_computes_a_mixture_of_mlps(case: str, top_k: int, zoo: Zoo, tmp_path: Path) -> None:
    dense, *names, first, form = CASES[case]
    experts = [zoo[str(name)] for name in [*names, dense]]
    gates = some_gates(zoo[dense], 3, first)
    model = build(experts, zoo[dense], gates, tmp_path, first, top_k)
    assert model.config.model_type == form == form_of(zoo[dense], first)
    batch = batch_of(*TEXTS, like="script" if dense == "script" else "stories")
    expected = reference(experts, zoo[dense], gates, first, top_k)
    assert close(logits(model, batch), logits(expected, batch), 2e-5)
    assert torch.equal(answers(model, batch), answers(expected, batch))


@cases
def test_a_single_expert_answers_as_it_does_alone(case: str, zoo: Zoo, tmp_path: Path) -> None:
    _, name, _, first, _ = CASES[case]
    expert = zoo[name]
    batch = batch_of(*TEXTS, like="script" if case.startswith("qwen2") else "stories")
    model = build([expert], expert, some_gates(expert, 1, first), tmp_path, first)
    assert close(logits(model, batch), logits(load(expert.path), batch), 1e-5)


@pytest.mark.parametrize("case", ["llama", "qwen2-hybrid"])
def test_gates_that_force_an_expert_use_its_mlps(case: str, zoo: Zoo, tmp_path: Path) -> None:
    dense, *names, first, _ = CASES[case]
    experts = [zoo[str(name)] for name in names]
    text = batch_of(TEXTS[0], like="script" if dense == "script" else "stories")
    forced = reference(experts[1:], zoo[dense], torch.zeros(9, 1, zoo[dense].hidden_size or 0), first, 1)
    seen: list[Tensor] = []
    for layer in forced.model.layers[first:]:
        layer.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    expected = logits(forced, text)
    # A direction in which all states of the text lie alike, since there is no bias to force with.
    ahead = torch.stack([torch.linalg.pinv(states) @ torch.full((len(states),), 50.0) for states in seen])
    gates = torch.stack([-ahead, ahead], dim=1)
    assert close(logits(build(experts, zoo[dense], gates, tmp_path, first), text), expected)


@pytest.mark.parametrize("case", ["llama", "qwen2-hybrid"])
def test_cache_padding_and_batch_mates_change_nothing(case: str, zoo: Zoo, tmp_path: Path) -> None:
    dense, *names, first, _ = CASES[case]
    like = "script" if dense == "script" else "stories"
    experts = [zoo[str(name)] for name in names]
    model = build(experts, zoo[dense], some_gates(zoo[dense], 2, first), tmp_path, first, 2)
    batch = batch_of(*TEXTS, like=like)
    alone = [logits(model, batch_of(text, like=like))[0] for text in TEXTS]
    for other in (batch, batch_of(*TEXTS, more=5, like=like), batch_of(*TEXTS, side="right", like=like)):
        assert close(logits(model, other), alone)
    found = answers(model, batch)
    assert torch.equal(answers(model, batch, use_cache=False), found)
    assert torch.equal(torch.cat([answers(model, batch_of(text, like=like)) for text in TEXTS]), found)
    assert torch.equal(answers(model, batch[[2, 0, 3, 1]]), found[[2, 0, 3, 1]])


@cases
def test_it_is_an_ordinary_checkpoint(case: str, zoo: Zoo, store: Store, tmp_path: Path) -> None:
    dense, *names, first, form = CASES[case]
    origin = zoo[dense]
    build([zoo[str(name)] for name in names], origin, some_gates(origin, 2, first), tmp_path, first)
    mixture = inspect_checkpoint("mixture", tmp_path, store)
    assert (mixture.tokenizer, mixture.dtype, mixture.tied_head) == (origin.tokenizer, origin.dtype, origin.tied_head)
    assert mixture.settings == origin.settings
    config, before = (json.loads((Path(one.path) / "config.json").read_text()) for one in (mixture, origin))
    assert config["rope_parameters"] == before["rope_parameters"]
    assert config["eos_token_id"] == before["eos_token_id"]
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        stored = set(file.keys())
    last = f"model.layers.{(origin.layers or 0) - 1}"
    if form == "mixtral":
        wanted = {f"{last}.block_sparse_moe.experts.1.w{number}.weight" for number in (1, 2, 3)}
        wanted.add(f"{last}.block_sparse_moe.gate.weight")
    else:
        wanted = {f"{last}.mlp.experts.1.{name}_proj.weight" for name in ("gate", "up", "down")}
        wanted.add(f"{last}.mlp.gate.weight")
    assert wanted <= stored
    files = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= files


def test_gate_inputs_are_what_the_gates_see(quick: Zoo, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    dense = quick["stories"]
    seen = gate_inputs(dense.path, TEXTS, "ffn", 2)
    assert seen.shape == (3, len(TEXTS), 64)
    model = build([dense, dense], dense, some_gates(dense, 2, 0), tmp_path)
    got: list[Tensor] = []
    for layer in model.model.layers[2:]:
        layer.mlp.gate.register_forward_pre_hook(lambda _, inputs: got.append(inputs[0].reshape(-1, 64).mean(dim=0)))
    tokenizer = AutoTokenizer.from_pretrained(dense.path)
    with torch.inference_mode():
        model(torch.tensor([tokenizer(TEXTS[2], add_special_tokens=False).input_ids]))
    assert torch.allclose(torch.stack(got), seen[:, 2], atol=1e-5)


def test_what_has_no_sparse_counterpart_is_named(tmp_path: Path, store: Store) -> None:
    from transformers import AutoConfig

    for kind, own, reason in (
        ("granite", {}, r"its architecture is GraniteForCausalLM \(there are ones for Llama, Mistral, Qwen2, Qwen3\)"),
        ("llama", {"attention_bias": True}, "no place for, model.layers.0.self_attn.k_proj.bias"),
        ("llama", {"mlp_bias": True}, "no place for, model.layers.0.mlp.down_proj.bias"),
        ("llama", {"hidden_act": "gelu"}, "its is gelu"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}, "a window of 4 tokens"),
    ):
        directory = tmp_path / f"{kind}{len(list(tmp_path.iterdir()))}"
        odd = made_of(AutoConfig.for_model(kind, **{**TINY, **own}), directory, store)  # type: ignore[dict-item]
        with pytest.raises(RecipeError, match=f"no sparse architecture for '{odd.id}': .*{reason}") as caught:
            check_level("ffn", [odd], odd)
        assert "mixture.level: block may do, mixture.level: model works for any models" in str(caught.value)
        check_level("block", [odd], odd)


def test_what_no_engine_knows_is_refused(quick: Zoo, tmp_path: Path) -> None:
    dense, gates = quick["stories"], Gates(torch.zeros(5, 1, 64))
    for settings in (LayerSettings(routing="sample"), LayerSettings(shared_gate=True)):
        with pytest.raises(RecipeError, match="for routing: sample"):
            build_ffn([dense], dense, gates, settings, tmp_path)
    with pytest.raises(ValueError, match="no bias"):
        build_ffn([dense], dense, Gates(gates.weight, torch.ones(5, 1)), LayerSettings(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_hybrid_that_vllm_would_misread_goes_elsewhere(quick: Zoo, store: Store, tmp_path: Path) -> None:
    vllm = ENGINES.get("vllm")
    for name, first, reason in (("stories", 0, None), ("script", 1, None), ("stories", 2, "heads of size 8")):
        directory = tmp_path / f"{name}{first}"
        dense = quick[name]
        build([dense], dense, some_gates(dense, 1, first), directory, first)
        found = vllm.unsupported(inspect_checkpoint("mixture", directory, store))
        assert (found is None) if reason is None else (reason in (found or ""))


ASK_VLLM = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    path, prompts = sys.argv[1], json.loads(sys.argv[2])
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "skip_tokenizer_init": True}
    model = LLM(model=path, kv_cache_memory_bytes=64 << 20, max_num_seqs=4, **options)
    sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
    found = model.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    print("ANSWERS" + json.dumps([list(one.outputs[0].token_ids) for one in found]))
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize("case", ["llama", "qwen2-hybrid", "qwen3-hybrid"])
def test_vllm_answers_as_transformers(case: str, zoo: Zoo, tmp_path: Path) -> None:
    dense, *names, first, _ = CASES[case]
    experts = [zoo[str(name)] for name in names]
    model = build(experts, zoo[dense], some_gates(zoo[dense], 2, first), tmp_path / "mixture", first, 2)
    prompts = [batch_of(text, like="script" if dense == "script" else "stories").ids for text in TEXTS]
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    expected = [model.generate(ids, **options)[0, ids.shape[1] :].tolist() for ids in prompts]
    script = tmp_path / "ask.py"
    script.write_text(ASK_VLLM)
    settings = EngineSettings(port=0, max_model_len=128, dtype="float32", kv_cache_mb=64, threads=1, share=0)
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "mixture"), json.dumps([ids[0].tolist() for ids in prompts])],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **ENGINES.get("vllm").environment(settings)},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    line = next(line for line in result.stdout.splitlines() if line.startswith("ANSWERS"))
    assert json.loads(line.removeprefix("ANSWERS")) == expected
