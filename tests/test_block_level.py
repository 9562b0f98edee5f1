"""Mixtures of layers: what one expert says, a mixture of it says; caches, padding and batch mates change nothing."""

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from composer.artefacts import Store
from composer.errors import RecipeError
from composer.evaluation.live import LiveScorer
from composer.evaluation.tasks import Split
from composer.mixture.blocks import BlockMixtureForCausalLM, MixtureCache, MixtureLayer, build_blocks
from composer.mixture.gates import Gates, gate_inputs
from composer.mixture.settings import LayerSettings
from composer.mixture.shapes import check_level
from composer.zoo import Checkpoint, inspect_checkpoint
from tests.checkpoints import write_checkpoint
from tests.conftest import MODELS
from tests.mixtures import GREEDY, TEXTS, TINY, Batch, answers, batch_of, close, load, logits, made_of

EXPERTS = ("stories-math", "stories-science", "stories-law")
SETTINGS = [
    LayerSettings(routing=routing, shared_gate=shared, top_k=top_k, dense_layers=dense)  # type: ignore[arg-type]
    for routing, shared, top_k, dense in product(("token", "sample"), (False, True), (1, 2), (0, 2))
]
Build = Callable[..., BlockMixtureForCausalLM]


def names(settings: LayerSettings) -> str:
    gate = "shared" if settings.shared_gate else "own"
    return f"{settings.routing}-{gate}-top{settings.top_k}-dense{settings.dense_layers}"


def those(**wanted: object) -> pytest.MarkDecorator:
    """Parametrise a test over the settings that are as wanted."""
    chosen = [one for one in SETTINGS if all(getattr(one, key) == value for key, value in wanted.items())]
    return pytest.mark.parametrize("settings", chosen, ids=names)


def some_gates(dense: Checkpoint, experts: int, settings: LayerSettings, seed: int = 0) -> Gates:
    """Return gates without meaning that send different texts to different experts."""
    seen = gate_inputs(dense.path, TEXTS, "block", settings.dense_layers)
    if settings.shared_gate:
        seen = seen[:1]
    torch.manual_seed(seed)
    weight = torch.randn(len(seen), experts, seen.shape[2]) / seen.std(dim=1, keepdim=True)
    return Gates(weight, -(weight @ seen.mean(dim=1)[..., None])[..., 0])


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Build and load a mixture in float32, each only once."""
    known: dict[str, BlockMixtureForCausalLM] = {}

    def make(
        experts: list[Checkpoint], dense: Checkpoint, settings: LayerSettings, gates: Gates | None = None
    ) -> BlockMixtureForCausalLM:
        key = f"{[one.id for one in experts]}{dense.id}{settings}"
        if gates is None and key in known:
            return known[key]
        directory = tmp_path_factory.mktemp("blocks")
        build_blocks(experts, dense, gates or some_gates(dense, len(experts), settings), settings, directory)
        model = load(directory)
        if gates is None:
            known[key] = model
        return model

    return make


@pytest.fixture(scope="module")
def mixed(build: Build, quick: dict[str, Checkpoint]) -> Callable[[LayerSettings], BlockMixtureForCausalLM]:
    """Mix three models that differ."""
    return lambda settings: build([quick[name] for name in EXPERTS], quick["stories"], settings)


@those(top_k=1)
def test_a_single_expert_answers_as_it_does_alone(
    settings: LayerSettings, build: Build, quick: dict[str, Checkpoint]
) -> None:
    expert, batch = quick["stories-math"], batch_of(*TEXTS)
    assert close(logits(build([expert], expert, settings), batch), logits(load(expert.path), batch), 1e-5)


@those()
def test_identical_experts_answer_as_one_whatever_the_gates(
    settings: LayerSettings, build: Build, quick: dict[str, Checkpoint]
) -> None:
    name, like = ("stories-math", "stories") if settings.shared_gate else ("script-code", "script")
    expert, batch = quick[name], batch_of(*TEXTS, like=like)
    model, alone = build([expert] * 3, expert, settings), load(expert.path)
    assert close(logits(model, batch), logits(alone, batch))
    assert torch.equal(answers(model, batch), answers(alone, batch))


@those(top_k=1, dense_layers=0)
def test_gates_that_force_an_expert_make_the_mixture_that_expert(
    settings: LayerSettings, build: Build, quick: dict[str, Checkpoint]
) -> None:
    bias = torch.zeros(1 if settings.shared_gate else 5, 3)
    bias[:, 1] = 50
    gates = Gates(torch.zeros(*bias.shape, 64), bias)
    model = build([quick[name] for name in EXPERTS], quick[EXPERTS[1]], settings, gates)
    batch = batch_of(*TEXTS)
    assert close(logits(model, batch), logits(load(quick[EXPERTS[1]].path), batch), 1e-5)


@those()
def test_the_cache_changes_nothing(settings: LayerSettings, mixed: Callable[..., Any]) -> None:
    model, batch = mixed(settings), batch_of(*TEXTS)
    options: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True}
    cached = model.generate(**batch.inputs, **options, **GREEDY)
    anew = model.generate(**batch.inputs, **options, **GREEDY, use_cache=False)
    assert isinstance(cached.past_key_values, MixtureCache)
    assert anew.past_key_values is None
    assert torch.equal(cached.sequences, anew.sequences)
    assert close(list(cached.logits), list(anew.logits))


@those()
def test_padding_batch_mates_and_order_change_nothing(settings: LayerSettings, mixed: Callable[..., Any]) -> None:
    model, batch = mixed(settings), batch_of(*TEXTS)
    alone = [logits(model, batch_of(text))[0] for text in TEXTS]
    for other in (
        batch,
        batch_of(*TEXTS, more=5),
        batch_of(*TEXTS, side="right"),
        batch_of(*TEXTS, side="right", more=3),
    ):
        assert close(logits(model, other), alone)
    order = [2, 0, 3, 1]
    assert close(logits(model, batch[order]), [alone[row] for row in order])
    found = answers(model, batch)
    assert torch.equal(answers(model, batch_of(*TEXTS, more=5)), found)
    assert torch.equal(answers(model, batch[order]), found[order])
    assert torch.equal(torch.cat([answers(model, batch_of(text)) for text in TEXTS]), found)


@those()
def test_saving_and_loading_is_exact(settings: LayerSettings, mixed: Callable[..., Any], tmp_path: Path) -> None:
    model, batch = mixed(settings), batch_of(*TEXTS)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.config.to_dict() == {**model.config.to_dict(), "_name_or_path": str(tmp_path)}
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(logits(model, batch), logits(again, batch), strict=True))


@those(top_k=2)
def test_beams_and_samples_need_no_cache(settings: LayerSettings, mixed: Callable[..., Any]) -> None:
    model, batch = mixed(settings), batch_of(*TEXTS)
    for options in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        found = []
        for use_cache in (True, False):
            torch.manual_seed(1)
            found.append(answers(model, batch, use_cache=use_cache, **options))
        assert torch.equal(*found)


def chosen(model: Any, batch: Batch) -> Tensor:
    """Return the expert with the largest share in the first sparse layer, `[batch, tokens or 1]`."""
    with torch.inference_mode():
        cache = model(**batch.inputs, use_cache=True).past_key_values
    return cache.routes[model.config.dense_layers].argmax(dim=-1)


def test_gates_tell_texts_and_tokens_apart(mixed: Callable[..., Any]) -> None:
    """Without which the tests here would show nothing."""
    batch = batch_of(*TEXTS)
    for settings in SETTINGS:
        found = chosen(mixed(settings), batch)
        assert len(found.unique()) > 1
        assert found.shape[1] == (batch.ids.shape[1] if settings.routing == "token" else 1)


def test_a_token_is_routed_by_itself(mixed: Callable[..., Any]) -> None:
    model, batch = mixed(LayerSettings(routing="token", top_k=2)), batch_of(TEXTS[1])
    short = Batch(batch.ids[:, :4], batch.mask[:, :4])
    assert close(logits(model, short), [logits(model, batch)[0][:4]])


def test_an_answer_stays_with_the_expert_of_its_prompt(mixed: Callable[..., Any]) -> None:
    model, batch = mixed(LayerSettings(routing="sample", dense_layers=2)), batch_of(*TEXTS)
    with torch.inference_mode():
        cache = model(**batch.inputs, use_cache=True).past_key_values
        before = {layer: shares.clone() for layer, shares in cache.routes.items()}
        for step in range(1, 9):
            mask = torch.cat([batch.mask, torch.ones(len(TEXTS), step, dtype=torch.long)], dim=1)
            model(input_ids=torch.full((len(TEXTS), 1), 40 + step), attention_mask=mask, past_key_values=cache)
    assert list(before) == [2, 3, 4]
    assert all(torch.equal(shares, cache.routes[layer]) for layer, shares in before.items())


def test_the_prompt_mask_says_what_decides(mixed: Callable[..., Any]) -> None:
    model = mixed(LayerSettings(routing="sample", shared_gate=True))
    text = batch_of(TEXTS[1])
    prompt = Batch(text.ids[:, :5], text.mask[:, :5])
    with torch.inference_mode():
        alone, given = (
            model(**batch.inputs, use_cache=True, **options).past_key_values.routes[0]
            for batch, options in ((prompt, {}), (text, {"prompt_mask": prompt.mask}))
        )
    assert torch.equal(alone, given)


@those(top_k=1, dense_layers=0)
def test_likelihoods_are_routed_by_their_context(settings: LayerSettings, mixed: Callable[..., Any]) -> None:
    from transformers import AutoTokenizer

    model, tokenizer = mixed(settings), AutoTokenizer.from_pretrained(MODELS / "stories")
    scorer = LiveScorer(model, tokenizer, Split(name="proxy", tasks=()))._lm
    endings = ("56", " went home to her mother and slept all day")
    contexts = [tuple(batch_of(text).ids[0].tolist()) for text in TEXTS]
    pairs = [
        (context, tuple(tokenizer(ending, add_special_tokens=False).input_ids))
        for context in contexts
        for ending in endings
    ]
    with torch.inference_mode():
        found = scorer.answers(pairs)
        for (context, ending), (likelihood, _) in zip(pairs, found, strict=True):
            read = model(torch.tensor([context]), use_cache=True)
            rest = model(torch.tensor([ending]), past_key_values=read.past_key_values)
            after = torch.cat([read.logits[0, -1:], rest.logits[0, :-1]]).log_softmax(dim=-1)
            assert likelihood == pytest.approx(float(after.gather(1, torch.tensor(ending)[:, None]).sum()), abs=1e-3)


def test_experts_that_no_prompt_needs_do_not_run(build: Build, quick: dict[str, Checkpoint]) -> None:
    settings = LayerSettings(routing="sample", dense_layers=2)
    bias = torch.tensor([[0.0, 9.0, 0.0], [9.0, 0.0, 0.0], [0.0, 0.0, 9.0]])
    experts = [quick[name] for name in EXPERTS]
    model = build(experts, quick["stories"], settings, Gates(torch.zeros(3, 3, 64), bias))
    ran = []
    for layer in model.language_model.model.layers[2:]:
        for number, expert in enumerate(layer.experts):
            expert.register_forward_hook(lambda *_, number=number: ran.append(number))
    answers(model, batch_of(*TEXTS), max_new_tokens=2, min_new_tokens=2)
    assert ran == [1, 0, 2, 1, 0, 2]


def test_the_cache_carries_decisions_with_its_rows(mixed: Callable[..., Any]) -> None:
    model, batch = mixed(LayerSettings(routing="sample")), batch_of(*TEXTS)
    new = torch.tensor([[50], [60], [70], [80]])

    def step(rows: list[int], change: Callable[[MixtureCache], Any]) -> Tensor:
        with torch.inference_mode():
            cache = model(**batch.inputs, use_cache=True).past_key_values
            change(cache)
            mask = torch.cat([batch.mask[rows], torch.ones(len(rows), 1, dtype=torch.long)], dim=1)
            found: Tensor = model(input_ids=new[rows], attention_mask=mask, past_key_values=cache).logits
        return found

    plain = step([0, 1, 2, 3], lambda cache: None)
    for rows, change in (
        ([3, 1, 0, 0], lambda cache: cache.reorder_cache(torch.tensor([3, 1, 0, 0]))),
        ([2, 0], lambda cache: cache.batch_select_indices(torch.tensor([2, 0]))),
        ([0, 0, 1, 1, 2, 2, 3, 3], lambda cache: cache.batch_repeat_interleave(2)),
    ):
        assert torch.allclose(step(rows, change), plain[rows], atol=1e-4)


def test_shares_weigh_the_experts_outputs(build: Build, quick: dict[str, Checkpoint]) -> None:
    settings = LayerSettings(routing="token", top_k=2, dense_layers=4)
    experts = [quick["stories-math"], quick["stories-law"]]
    bias = torch.tensor([[0.0, 1.0]])
    model = build(experts, quick["stories"], settings, Gates(torch.zeros(1, 2, 64), bias))
    outputs = []
    for expert in experts:
        dense = load(quick["stories"].path).model
        dense.layers[4] = load(expert.path).model.layers[4]
        dense.norm = torch.nn.Identity()
        with torch.inference_mode():
            outputs.append(dense(**batch_of(TEXTS[0]).inputs).last_hidden_state)
    share = bias.softmax(dim=-1)[0]
    language = model.language_model
    with torch.inference_mode():
        expected = language.lm_head(language.model.norm(share[0] * outputs[0] + share[1] * outputs[1]))
    assert close(logits(model, batch_of(TEXTS[0])), list(expected), 1e-5)


@pytest.mark.parametrize("routing", ["token", "sample"])
def test_it_runs_in_bfloat16_with_gates_in_float32(routing: Any, build: Build, quick: dict[str, Checkpoint]) -> None:
    settings = LayerSettings(routing=routing, top_k=2)
    model = build([quick[name] for name in EXPERTS], quick["stories"], settings)
    half = load(model.config._name_or_path, dtype=torch.bfloat16)
    kinds = {name: tensor.dtype for name, tensor in half.state_dict().items()}
    assert {dtype for name, dtype in kinds.items() if ".gate." in name} == {torch.float32}
    assert {dtype for name, dtype in kinds.items() if ".gate." not in name} == {torch.bfloat16}
    batch = batch_of(*TEXTS)
    assert answers(half, batch).shape == (4, 6)
    for exact, rounded in zip(logits(model, batch), logits(half, batch), strict=True):
        assert torch.nn.functional.cosine_similarity(exact, rounded.float(), dim=-1).min() > 0.99


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("mistral", {"sliding_window": 4}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
        ("qwen3", {"head_dim": 32}),
        ("granite", {"residual_multiplier": 0.5, "logits_scaling": 2.0, "embedding_multiplier": 3.0}),
    ],
)
@pytest.mark.parametrize("routing", ["token", "sample"])
def test_other_architectures_keep_their_own_ways(
    kind: str, own: dict[str, Any], routing: Any, build: Build, tmp_path: Path, store: Store
) -> None:
    from transformers import AutoConfig

    expert = made_of(AutoConfig.for_model(kind, **TINY, **own), tmp_path / kind, store)
    model, alone = (
        build([expert, expert], expert, LayerSettings(routing=routing, dense_layers=1, top_k=2)),
        load(expert.path),
    )
    batch = batch_of(*TEXTS)
    assert close(logits(model, batch), logits(alone, batch))
    assert torch.equal(answers(model, batch), answers(alone, batch))


@pytest.mark.parametrize("dense_layers", [0, 2])
def test_gate_inputs_are_what_the_gates_see(dense_layers: int, build: Build, quick: dict[str, Checkpoint]) -> None:
    from transformers import AutoTokenizer

    dense = quick["stories"]
    seen = gate_inputs(dense.path, TEXTS, "block", dense_layers)
    assert seen.shape == (5 - dense_layers, len(TEXTS), 64)
    model = build([dense, dense], dense, LayerSettings(dense_layers=dense_layers))
    got: list[Tensor] = []
    for layer in model.language_model.model.layers[dense_layers:]:
        assert isinstance(layer, MixtureLayer)
        layer.register_forward_pre_hook(lambda _, inputs: got.append(inputs[0].mean(dim=1)))
    tokenizer = AutoTokenizer.from_pretrained(dense.path)
    with torch.inference_mode():
        model(torch.tensor([tokenizer(TEXTS[2], add_special_tokens=False).input_ids]))
    assert torch.allclose(torch.cat(got), seen[:, 2], atol=1e-5)


def test_a_mixture_is_a_checkpoint_like_others(quick: dict[str, Checkpoint], store: Store, tmp_path: Path) -> None:
    settings = LayerSettings(dense_layers=1)
    experts = [quick[name] for name in EXPERTS]
    hashes = build_blocks(experts, quick["stories"], some_gates(quick["stories"], 3, settings), settings, tmp_path)
    mixture = inspect_checkpoint("mixture", tmp_path, store)
    assert mixture.architecture == "BlockMixtureForCausalLM"
    assert (mixture.hidden_size, mixture.layers, mixture.tied_head) == (64, 5, True)
    assert mixture.tokenizer == quick["stories"].tokenizer
    assert mixture.dtype == "BF16"
    assert list(hashes) == ["model.safetensors"]


def altered(directory: Path, like: Checkpoint, store: Store, **config: object) -> Checkpoint:
    from safetensors.torch import load_file

    tensors = load_file(Path(like.path) / "model.safetensors")
    write_checkpoint(directory, tensors, like=Path(like.path), **config)
    return inspect_checkpoint(directory.name, directory, store)


def other_merges(directory: Path, like: Checkpoint, store: Store) -> Checkpoint:
    shutil.copytree(like.path, directory)
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].reverse()
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    return inspect_checkpoint(directory.name, directory, store)


@pytest.mark.parametrize("level", ["block", "ffn"])
def test_what_does_not_fit_is_named(level: Any, quick: dict[str, Checkpoint], store: Store, tmp_path: Path) -> None:
    dense = quick["stories"]
    check_level(level, [quick[name] for name in EXPERTS], dense)
    for expert, reason in (
        (quick["script"], r"'script' into 'stories': another architecture \(LlamaForCausalLM, Qwen2ForCausalLM\)"),
        (other_merges(tmp_path / "merges", dense, store), "'merges' into 'stories': other tokenizer merges"),
        (altered(tmp_path / "eps", dense, store, rms_norm_eps=1e-6), r"another rms_norm_eps \(1e-05, 1e-06\)"),
        (quick["stories-math"].model_copy(update={"quantisation": "gptq"}), r"stored quantised \(gptq\)"),
    ):
        with pytest.raises(RecipeError, match=reason) as caught:
            check_level(level, [quick["stories-math"], expert], dense)
        assert str(caught.value).endswith("mixture.level: model works for any models")
        assert "\n" not in str(caught.value)


def test_shapes_that_differ_are_named(tmp_path: Path, store: Store) -> None:
    from transformers import AutoConfig

    def tiny(name: str, **changes: Any) -> Checkpoint:
        return made_of(AutoConfig.for_model("llama", **{**TINY, **changes}), tmp_path / name, store)

    dense = tiny("dense")
    for change, reason in (
        ({"hidden_size": 32}, r"hidden size \(32, 64\)"),
        ({"num_hidden_layers": 2}, r"number of layers \(2, 4\)"),
        ({"intermediate_size": 80}, r"MLP size \(80, 96\)"),
        ({"num_attention_heads": 2}, r"number of attention heads \(2, 4\)"),
        ({"num_key_value_heads": 4}, r"number of key-value heads \(2, 4\)"),
    ):
        with pytest.raises(RecipeError, match=f"'other' into 'dense': another {reason}"):
            check_level("block", [tiny("other", **change)], dense)
        shutil.rmtree(tmp_path / "other")
    tied = tiny("tied", tie_word_embeddings=True)
    assert tied.tied_head
    assert not dense.tied_head
    check_level("block", [tied], dense)  # the head is the dense model's


def test_an_architecture_of_another_layout_is_refused(tmp_path: Path, store: Store) -> None:
    from transformers import GPT2Config

    odd = made_of(GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=2), tmp_path / "odd", store)
    for level, reason in (("block", "GPT2LMHeadModel is laid out otherwise"), ("ffn", "mixture.level: block may do")):
        with pytest.raises(RecipeError, match=reason):
            check_level(level, [odd], odd)  # type: ignore[arg-type]


def test_wrong_use_is_explained(mixed: Callable[..., Any], quick: dict[str, Checkpoint], tmp_path: Path) -> None:
    from transformers import DynamicCache

    model, batch = mixed(SETTINGS[0]), batch_of(TEXTS[0])
    with pytest.raises(ValueError, match="takes a MixtureCache"):
        model(**batch.inputs, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="no hidden states"):
        model(**batch.inputs, output_hidden_states=True)
    dense, gates = quick["stories"], Gates(torch.zeros(5, 1, 64))
    with pytest.raises(RecipeError, match="'stories' has 5, so give at most 4"):
        build_blocks([dense], dense, gates, LayerSettings(dense_layers=5), tmp_path)
    with pytest.raises(RecipeError, match="only 1 experts"):
        build_blocks([dense], dense, gates, LayerSettings(top_k=2), tmp_path)
    with pytest.raises(ValueError, match=r"\(5, 1, 64\) where \(1, 1, 64\) is due"):
        build_blocks([dense], dense, gates, LayerSettings(shared_gate=True), tmp_path)
    assert not list(tmp_path.iterdir())
