"""Probes: records small enough to keep and good enough to stand for the model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from composer.artefacts import Store
from composer.errors import RecipeError, ZooError
from composer.probes import Behaviour, ProbesSection, compare_records, load_texts, record_probes
from composer.probes.attention import QUERIES
from composer.probes.record import DEPTHS
from composer.probes.texts import DEFAULT
from composer.similarity import SignalSection, compare
from composer.zoo import Checkpoint, Zoo, inspect_checkpoint
from tests.checkpoints import add_tokens, write_checkpoint
from tests.conftest import MODELS

TEXTS = load_texts("default", 12, 300)


def exact(checkpoint: Checkpoint, text: str) -> torch.Tensor:
    """Log-probabilities of every next token of a text, `[positions, vocabulary]`, in float64."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : checkpoint.context_length]
    with torch.inference_mode():
        return model(ids).logits[0].double().log_softmax(dim=-1)


def behaviour(first: Checkpoint, second: Checkpoint, store: Store) -> Behaviour:
    members = [(one, record_probes(one, TEXTS, store)) for one in (first, second)]
    return compare_records(members, store)[first.id, second.id]


PAIRS = [("stories", "stories-math"), ("stories-web", "stories-law"), ("script-code", "script-play")]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_divergence_from_records_is_within_one_percent(
    quick: dict[str, Checkpoint], shared_store: Store, first: str, second: str
) -> None:
    a, b = quick[first], quick[second]
    found = behaviour(a, b, shared_store)
    p, q = (torch.cat([exact(one, text) for text in TEXTS]) for one in (a, b))
    forward, backward = (p.exp() * (p - q)).sum(-1), (q.exp() * (q - p)).sum(-1)
    assert found.forward is not None
    assert found.backward is not None
    assert found.forward.mean == pytest.approx(float(forward.mean()), rel=0.01)
    assert found.backward.mean == pytest.approx(float(backward.mean()), rel=0.01)
    assert found.forward.median == pytest.approx(float(forward.median()), rel=0.02)
    assert found.forward.high == pytest.approx(float(forward.quantile(0.9)), rel=0.02)
    assert found.overlap == pytest.approx(float(((p + q) / 2).exp().sum(-1).mean()), abs=1e-4)
    assert found.top_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=0.005)
    entropies = [-(one.exp() * one).sum(-1) for one in (p, q)]
    assert found.entropy_gap == pytest.approx(float((entropies[0] - entropies[1]).mean()), abs=1e-3)


def test_divergence_of_a_close_pair(tmp_path: Path, quick: dict[str, Checkpoint], store: Store) -> None:
    """A model and itself with a little noise: the divergence is small, and still within a hundredth."""
    plain = quick["stories"]
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: tensor.float() * (1 + 0.01 * torch.randn(tensor.shape, generator=generator))
        for name, tensor in load_file(Path(plain.path) / "model.safetensors").items()
    }
    near = inspect_checkpoint("near", write_checkpoint(tmp_path / "near", tensors), store)
    found = behaviour(plain, near, store)
    p, q = (torch.cat([exact(one, text) for text in TEXTS]) for one in (plain, near))
    value = float((p.exp() * (p - q)).sum(-1).mean())
    assert value < 0.01
    assert found.forward is not None
    assert found.forward.mean == pytest.approx(value, rel=0.01)


def test_a_model_and_itself(quick: dict[str, Checkpoint], shared_store: Store) -> None:
    found = behaviour(quick["stories"], quick["stories"].renamed("twin"), shared_store)
    assert found.forward is not None
    assert found.forward.mean == pytest.approx(0, abs=1e-6)
    assert found.overlap == pytest.approx(1)
    assert found.alignment == pytest.approx(1)
    assert found.top_agreement == 1


def test_the_order_of_a_pair_only_turns_it_round(quick: dict[str, Checkpoint], shared_store: Store) -> None:
    a, b = quick["stories"], quick["stories-math"]
    one, other = behaviour(a, b, shared_store), behaviour(b, a, shared_store)
    assert one == other.reversed()
    assert one.forward != one.backward


def test_a_record_is_small_and_says_what_it_holds(quick: dict[str, Checkpoint], store: Store) -> None:
    record = record_probes(quick["stories"], TEXTS, store)
    positions = sum(map(len, record.tokens))
    hidden = quick["stories"].hidden_size
    assert hidden is not None
    arrays = record.arrays
    assert arrays["hidden"].shape == (positions, hidden)
    assert arrays["pooled"].shape == (len(TEXTS), 4, len(DEPTHS), hidden)
    assert arrays["attention"].shape == (len(TEXTS), len(DEPTHS), len(QUERIES), 16)
    bound = (
        positions * (2 * hidden + 12) + len(TEXTS) * (4 * len(DEPTHS) * 2 * hidden + len(DEPTHS) * 4 * 16 * 2) + 4096
    )
    assert record.size_bytes < bound
    rebuilt = exact(quick["stories"], TEXTS[3])
    start = sum(map(len, record.tokens[:3]))
    ids = torch.tensor(record.tokens[3])
    following = arrays["next"][start : start + len(ids)]
    assert torch.allclose(following[:-1].double(), rebuilt[:-1].gather(1, ids[1:, None]).squeeze(1), atol=1e-4)
    assert following[-1].isnan()


def test_padding_and_batch_mates_change_nothing(quick: dict[str, Checkpoint], tmp_path: Path) -> None:
    one, other = TEXTS[0], TEXTS[5]
    alone = record_probes(quick["script-play"], [one], Store(tmp_path / "a")).arrays
    together = record_probes(quick["script-play"], [one, other + other], Store(tmp_path / "b")).arrays
    count = len(alone["normaliser"])
    for name in ("normaliser", "hidden"):
        assert torch.allclose(alone[name].float(), together[name][:count].float(), atol=2e-3)
    for name in ("pooled", "attention"):
        assert torch.allclose(alone[name][0].float(), together[name][0].float(), atol=2e-3, equal_nan=True)


def test_attention_is_what_the_eager_model_says(quick: dict[str, Checkpoint], store: Store) -> None:
    record = record_probes(quick["script-play"], TEXTS[:2], store)
    kept = record.arrays["attention"].float()
    assert torch.allclose(kept.sum(dim=-1), torch.ones(kept.shape[:-1]), atol=5e-3)
    path = quick["script-play"].path
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(path)
    encoded = tokenizer(TEXTS[0], return_offsets_mapping=True)
    ends = [end for _, end in encoded["offset_mapping"]]
    with torch.inference_mode():
        attention = model(torch.tensor([encoded["input_ids"]]), output_attentions=True).attentions
    last = attention[-1][0].mean(dim=0)[len(ends) - 1]
    expected = torch.zeros(16)
    for weight, end in zip(last, ends, strict=True):
        expected[min(15, max(0, end - 1) * 16 // ends[-1])] += weight
    assert torch.allclose(kept[0, -1, -1], expected, atol=2e-3)


def test_the_same_run_is_not_made_twice(quick: dict[str, Checkpoint], store: Store) -> None:
    first = record_probes(quick["stories"], TEXTS, store)
    time = (Path(first.path) / "record.safetensors").stat().st_mtime_ns
    again = record_probes(quick["stories"], TEXTS, store)
    assert (Path(again.path) / "record.safetensors").stat().st_mtime_ns == time
    other = record_probes(quick["stories"], TEXTS[:3], store)
    assert other.path != first.path


def test_another_tokenizer_is_left_out_of_logits_with_the_reason(
    quick: dict[str, Checkpoint], shared_store: Store
) -> None:
    found = behaviour(quick["stories"], quick["script-code"], shared_store)
    assert found.forward is None
    assert found.overlap is None
    assert "another tokenizer" in found.left_out["logits"]
    assert found.alignment is not None, "hidden states are aligned by characters"


def test_added_tokens_do_not_stand_in_the_way(tmp_path: Path, quick: dict[str, Checkpoint], store: Store) -> None:
    plain = quick["stories"]
    tensors = load_file(Path(plain.path) / "model.safetensors")
    extra = tensors["model.embed_tokens.weight"][:2]
    tensors["model.embed_tokens.weight"] = torch.cat([tensors["model.embed_tokens.weight"], extra])
    path = write_checkpoint(tmp_path / "more", tensors, vocab_size=514)
    add_tokens(path, "<a>", "<b>")
    found = behaviour(plain, inspect_checkpoint("more", path, store), store)
    assert found.forward is not None, found.left_out
    assert found.forward.mean == pytest.approx(0, abs=1e-6), "alike over the tokens both have"
    assert found.overlap == pytest.approx(1)


def test_signals_of_a_zoo(quick: dict[str, Checkpoint], shared_store: Store) -> None:
    names = ("stories", "stories-math", "script-code", "script-play")
    zoo = Zoo(members=tuple(quick[name] for name in names))
    probes = ProbesSection(limit=12, characters=300)
    logits = compare(zoo, shared_store, SignalSection(signal="logits"), probes)
    hidden = compare(zoo, shared_store, SignalSection(signal="hidden"), probes)
    assert logits.between("stories", "script-code") is None
    for matrix in (logits, hidden):
        value = matrix.between("script-code", "script-play")
        assert value is not None
        assert 0 < value < 1
        assert set(matrix.record_bytes) == set(names)
    across, within = hidden.between("stories", "script-code"), hidden.between("stories", "stories-math")
    assert across is not None
    assert within is not None
    assert across < within


def test_texts_of_ones_own(tmp_path: Path) -> None:
    plain, lines = tmp_path / "texts.txt", tmp_path / "texts.jsonl"
    plain.write_text("one line\n\nanother line\n")
    lines.write_text('{"text": "first"}\n{"text": "second"}\n')
    assert load_texts(str(plain), 9, 100) == ("one line", "another line")
    assert load_texts(str(lines), 1, 100) == ("first",)
    assert load_texts(str(plain), 9, 3) == ("one", "ano")
    lines.write_text('{"text": "first"}\nnonsense\n')
    with pytest.raises(RecipeError, match=r"texts.jsonl:2: not a JSON object"):
        load_texts(str(lines), 9, 100)
    plain.write_text("\n")
    with pytest.raises(RecipeError, match="holds no text"):
        load_texts(str(plain), 9, 100)
    with pytest.raises(RecipeError, match="absent cannot be read"):
        load_texts(str(tmp_path / "absent"), 9, 100)


def test_the_shipped_texts_are_few_and_varied() -> None:
    assert DEFAULT.stat().st_size <= 100_000
    texts = load_texts("default", 1000, 100_000)
    assert len(texts) == len(set(texts)) == 96
    assert all(len(text) >= 350 for text in texts)


def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path: Path, store: Store) -> None:
    tensors = load_file(MODELS / "stories" / "model.safetensors")
    path = write_checkpoint(tmp_path / "m", tensors, hidden_act="no-such-function")
    save_file(tensors, path / "model.safetensors")
    checkpoint = inspect_checkpoint("m", path, store)
    with pytest.raises(ZooError, match=r"model 'm': transformers cannot load it: .*no-such-function"):
        record_probes(checkpoint, TEXTS, store)
    assert not list((store.root / "probes").iterdir())
    zoo = Zoo(members=(inspect_checkpoint("good", MODELS / "stories", store), checkpoint))
    probes = ProbesSection(limit=3)
    with pytest.raises(ZooError, match="model 'm'"):
        compare(zoo, store, SignalSection(signal="hidden"), probes)
    matrix = compare(zoo, store, SignalSection(signal="hidden"), probes, skip_broken=True)
    assert matrix.ids == ("good",)
    assert "no-such-function" in matrix.skipped["m"]
