"""The living engine: after a swap it answers as an engine that was started on the same weights."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from composer.artefacts import Store
from composer.errors import ServeError
from composer.serving.swap import MEMORY, LivingEngine, berth
from composer.zoo import Checkpoint, inspect_checkpoint
from tests.conftest import MODELS, ROOT, children, survivors

CONTEXTS = ("3 + 4 =", "Once upon a time there was", "Once upon a time there was a little girl with a red ball. " * 8)
CONTINUATION = " 7, and they went home."
TOKENS = 12
KINDS = ("tied", "untied")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """By kind three models of one shape: two, and their mean."""
    directory = tmp_path_factory.mktemp("weights")
    found: dict[str, dict[str, Path]] = {kind: {} for kind in KINDS}
    for kind in KINDS:
        made = []
        for name in ("stories", "stories-math"):
            tensors = load_file(MODELS / name / "model.safetensors")
            if kind == "untied":
                embedding = tensors["model.embed_tokens.weight"]
                tensors["lm_head.weight"] = embedding * torch.linspace(0.7, 1.3, len(embedding.T)).to(embedding.dtype)
            made.append(tensors)
            found[kind][name] = written(directory / f"{kind}-{name}", tensors)
        first, second = made
        mean = {name: (tensor + second[name]) / 2 for name, tensor in first.items()}
        found[kind]["mean"] = written(directory / f"{kind}-mean", mean)
    return found


def written(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    shutil.copytree(MODELS / "stories", path)
    config = json.loads((path / "config.json").read_text())
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def encoded(text: str) -> tuple[int, ...]:
    return tuple(AutoTokenizer.from_pretrained(MODELS / "stories").encode(text, add_special_tokens=False))


@pytest.fixture(scope="module")
def fresh(
    weights: dict[str, dict[str, Path]], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], list[tuple[float, bool, list[int]]]]:
    """What engines that were started on the weights say: likelihood, greediness, and what they write."""
    pytest.importorskip("vllm")
    directory = tmp_path_factory.mktemp("fresh")
    tail = encoded(CONTINUATION)
    scored = {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 0}
    greedy = {"temperature": 0, "max_tokens": TOKENS}
    plain = {"expert": None}
    batches = [
        [{**plain, "prompt": [*encoded(context), *tail], "sampling": scored} for context in CONTEXTS],
        [{**plain, "prompt": encoded(context), "sampling": greedy} for context in CONTEXTS],
    ]
    keys = [(kind, name) for kind in KINDS for name in weights[kind]]
    runs = [{"engine": {"model": str(weights[kind][name])}, "batches": batches} for kind, name in keys]
    (directory / "runs.json").write_text(json.dumps(runs))
    command = [sys.executable, str(ROOT / "tests" / "vllm_runs.py"), str(directory / "runs.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, str(directory / "out.json")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for key, run in zip(keys, json.loads((directory / "out.json").read_text()), strict=True):
        scores = [[next(iter(place.values())) for place in one["prompt"][-len(tail) :]] for one in run["batches"][0]]
        found[key] = [
            (sum(value for value, _ in score), all(rank == 1 for _, rank in score), answer["tokens"])
            for score, answer in zip(scores, run["batches"][1], strict=True)
        ]
    return found


@pytest.fixture(scope="module", params=KINDS)
def living(
    request: pytest.FixtureRequest, weights: dict[str, dict[str, Path]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, LivingEngine]]:
    """An engine for models with or without an output head of their own."""
    pytest.importorskip("vllm")
    directory = tmp_path_factory.mktemp("living")
    checkpoint = inspect_checkpoint("stories", weights[request.param]["stories"], Store(directory / "store"))
    with LivingEngine(checkpoint, directory / "engine.log", max_model_len=400, kv_cache_mb=64) as engine:
        yield request.param, engine
        processes = children(os.getpid())
    assert not survivors(processes)


def same(engine: LivingEngine, fresh: list[tuple[float, bool, list[int]]]) -> None:
    """Compare what an engine says with what another one said."""
    tail = encoded(CONTINUATION)
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "stories")
    scores = engine.score([(encoded(context), tail) for context in CONTEXTS])
    texts = engine.complete([encoded(context) for context in CONTEXTS], TOKENS)
    for (likelihood, greedy), text, (other, also, tokens) in zip(scores, texts, fresh, strict=True):
        assert likelihood == pytest.approx(other, abs=1e-3)
        assert greedy == also
        assert text.strip() == tokenizer.decode(tokens, skip_special_tokens=True).strip()


@pytest.mark.slow
def test_swapped_weights_answer_as_those_of_a_fresh_engine(
    living: tuple[str, LivingEngine], weights: dict[str, dict[str, Path]], fresh: dict[tuple[str, str], Any]
) -> None:
    kind, engine = living
    assert len({str(fresh[kind, name]) for name in weights[kind]}) == 3, "else nothing is compared"
    assert all(len(set(tokens)) > 4 for *_, tokens in fresh[kind, "stories"])
    same(engine, fresh[kind, "stories"])
    for name in ("stories-math", "mean", "stories", "stories-math"):
        engine.swap(weights[kind][name])
        same(engine, fresh[kind, name])


@pytest.mark.slow
def test_tensors_are_swapped_in_as_files_are(
    living: tuple[str, LivingEngine], weights: dict[str, dict[str, Path]], fresh: dict[tuple[str, str], Any]
) -> None:
    kind, engine = living
    engine.load(load_file(weights[kind]["mean"] / "model.safetensors"))
    same(engine, fresh[kind, "mean"])


@pytest.mark.slow
def test_weights_that_are_not_finite_leave_nothing_behind(
    living: tuple[str, LivingEngine], weights: dict[str, dict[str, Path]], fresh: dict[tuple[str, str], Any]
) -> None:
    kind, engine = living
    tensors = load_file(weights[kind]["mean"] / "model.safetensors")
    engine.load({name: torch.full_like(tensor, float("nan")) for name, tensor in tensors.items()})
    tail = encoded(CONTINUATION)
    assert not any(isfinite(likelihood) for likelihood, _ in engine.score([(encoded(one), tail) for one in CONTEXTS]))
    engine.swap(weights[kind]["stories"])
    same(engine, fresh[kind, "stories"])


@pytest.mark.slow
def test_weights_of_another_shape_are_refused_and_nothing_changes(
    living: tuple[str, LivingEngine],
    weights: dict[str, dict[str, Path]],
    fresh: dict[tuple[str, str], Any],
    tmp_path: Path,
) -> None:
    kind, engine = living
    engine.swap(weights[kind]["stories"])
    tensors = load_file(weights[kind]["mean"] / "model.safetensors")
    with pytest.raises(ServeError, match=r"tensor model.norm.weight is 63, in 'stories' it is 64; only models of one"):
        engine.load({**tensors, "model.norm.weight": torch.zeros(63)})
    with pytest.raises(ServeError, match=r"tensor extra is 1, in 'stories' it is missing"):
        engine.load({**tensors, "extra": torch.zeros(1)})
    tensors.pop("model.norm.weight")
    with pytest.raises(ServeError, match=r"tensor model.norm.weight is missing, in 'stories' it is 64"):
        engine.load(tensors)
    broken = shutil.copytree(weights[kind]["mean"], tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-10])
    with pytest.raises(ServeError, match="truncated"):
        engine.swap(broken)
    with pytest.raises(ServeError):
        engine.swap(tmp_path)
    same(engine, fresh[kind, "stories"])


@pytest.mark.slow
def test_what_is_too_long_loses_its_left_end(living: tuple[str, LivingEngine]) -> None:
    _, engine = living
    tail = encoded(CONTINUATION)
    long = encoded(CONTEXTS[2]) * 4
    whole, cut = engine.score([(long, tail), (long[-(engine.max_model_len - 1 - len(tail)) :], tail)])
    assert len(long) > engine.max_model_len
    assert whole == cut
    assert engine.complete([long], 5) == engine.complete([long[-(engine.max_model_len - 5) :]], 5)


@pytest.mark.slow
def test_an_answer_ends_where_it_is_told_to(living: tuple[str, LivingEngine]) -> None:
    _, engine = living
    (whole,) = engine.complete([encoded(CONTEXTS[1])], TOKENS)
    middle = whole[len(whole) // 2]
    assert engine.complete([encoded(CONTEXTS[1])], TOKENS, stop=[middle]) == [whole[: whole.index(middle)]]


@pytest.mark.slow
def test_an_engine_that_cannot_start_says_so(quick: dict[str, Checkpoint], tmp_path: Path) -> None:
    path = shutil.copytree(MODELS / "stories", tmp_path / "model")
    broken = quick["stories"].model_copy(update={"path": str(path)})
    (path / "config.json").write_text("{}")
    before = children(os.getpid())
    with pytest.raises(ServeError, match=r"the engine of 'stories' died; the log says why: .*engine.log"):
        LivingEngine(broken, tmp_path / "engine.log").__enter__()
    assert children(os.getpid()) == before
    engine = LivingEngine(quick["stories"], tmp_path / "engine.log")
    with pytest.raises(ServeError, match="is not running"):
        engine.score([((1,), (2,))])


def test_it_does_not_outlive_its_parent(tmp_path: Path) -> None:
    script = f"""
from pathlib import Path
from composer.artefacts import Store
from composer.serving.swap import LivingEngine
from composer.zoo import inspect_checkpoint
one = inspect_checkpoint("one", Path({str(MODELS / "stories")!r}), Store(Path({str(tmp_path)!r})))
LivingEngine(one, Path({str(tmp_path / "engine.log")!r})).__enter__()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", script], env=environment)
    family: list[psutil.Process] = []
    deadline = time.monotonic() + 60
    while len(family) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
        family = children(parent.pid)
    assert len(family) >= 2, "guard and engine"
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert not survivors(family)


def test_weights_lie_in_memory_where_there_is_room() -> None:
    with berth(1000) as directory:
        assert directory.is_dir()
        assert (directory.parent == MEMORY) == os.access(MEMORY, os.W_OK)
    assert not directory.exists()
    with berth(1 << 60) as directory:
        assert directory.parent != MEMORY
