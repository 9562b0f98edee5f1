"""Who sits in which engine, and what of the machine each gets."""

import itertools
import os
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from composer.artefacts import Store
from composer.mixture import Composite, Expert, build_composite
from composer.mixture.settings import MixtureSection, RouterSection
from composer.serving.engines import ENGINES
from composer.serving.engines.machine import Gpu
from composer.serving.places import GPU_LEAST, GPU_PART, on_gpus, places_of, threads_for
from composer.serving.server import Server
from composer.serving.settings import ServeSection
from composer.zoo import Checkpoint, ModelReference, inspect_checkpoint, make_whole
from tests.conftest import MODELS, NOT_ASKED
from tests.test_adapters import make_adapter
from tests.test_routers import CODE, MATH

GB = 1 << 30
LAW = "The law says that"


def gpus(*free: int, total: int = 80) -> list[Gpu]:
    return [Gpu(index, total * GB, each * GB) for index, each in enumerate(free)]


def test_one_gpu_is_split_by_what_models_need_and_the_rest_evenly() -> None:
    small, large = on_gpus([10 * GB, 30 * GB], gpus(80))
    assert small.gpus == large.gpus == (0,)
    assert small.part + large.part == pytest.approx(GPU_PART, abs=1e-6)
    assert large.part - small.part == pytest.approx(20 / 80)
    assert not small.sleeps


def test_several_gpus_are_filled_evenly() -> None:
    shares = on_gpus([30 * GB] * 4, gpus(80, 80))
    assert [share.gpus for share in shares] == [(0,), (1,), (0,), (1,)]
    assert all(share.part == pytest.approx(GPU_PART / 2) for share in shares)
    assert [share.gpus for share in on_gpus([GB], gpus(3, 60))] == [(1,)], "where there is most room"


def test_what_is_larger_than_a_gpu_goes_over_several() -> None:
    wide, narrow = on_gpus([100 * GB, 10 * GB], gpus(80, 80, 80, 80))
    assert len(wide.gpus) == 2
    assert set(wide.gpus).isdisjoint(narrow.gpus)
    assert wide.part > (50 * GB + GPU_LEAST) / (80 * GB)


def test_where_there_is_no_room_for_all_they_take_turns() -> None:
    shares = on_gpus([50 * GB, 50 * GB], gpus(80))
    assert all(share.sleeps and share.part == GPU_PART for share in shares)


@pytest.mark.parametrize("sizes", itertools.product([1, 20, 60], repeat=3))
def test_no_gpu_is_promised_more_than_it_has(sizes: tuple[int, ...]) -> None:
    shares = on_gpus([size * GB for size in sizes], gpus(80, 70))
    for index, free in enumerate((80, 70)):
        own = [share.part for share in shares if index in share.gpus and not share.sleeps]
        assert sum(own) <= min(GPU_PART, free / 80) + 1e-9


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores can be set apart on Linux only")
def test_engines_share_the_cores_that_this_process_may_use() -> None:
    allowed = os.sched_getaffinity(0)
    assert 1 <= threads_for(1) <= len(allowed)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert [threads_for(engines) for engines in (0, 1, 3)] == [1, 1, 1]
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.slow
def test_experts_of_one_shape_share_an_engine_and_answer_for_themselves(
    quick: dict[str, Checkpoint], shared_store: Store, tmp_path: Path
) -> None:
    if ENGINES.get("vllm").missing():
        pytest.skip("vLLM is not installed")
    names = ("stories-math", "stories-web", "script-code")
    experts = tuple(Expert(id=n, checkpoint=quick[n], members=(n,), examples=(), reason="") for n in names)
    mixture = MixtureSection(router=RouterSection(kind="fixed", abstain_to="stories-math"))
    directory = build_composite("close", experts, {}, mixture, shared_store, NOT_ASKED)
    section = ServeSection(port=0, kv_cache_mb=64, colocate="always")
    assert [one.experts for one in places_of(Composite.open(directory), section)] == [names[:2], names[2:]]
    with Server(directory, section, tmp_path) as server:
        url = f"{server.endpoint.url}/v1/completions"
        assert any("2 experts share an engine, which saves" in note for note in server.endpoint.notes)

        def ask(name: str, **more: object) -> str:
            body = {"model": name, "prompt": LAW, "max_tokens": 16, "temperature": 0, **more}
            return str(httpx.post(url, json=body, timeout=60).json()["choices"][0]["text"])

        texts = {name: ask(name) for name in names}
        assert len(set(texts.values())) == 3
        for name, text in texts.items():
            assert text.strip() == greedy(quick[name], LAW, 16), name
        # A client cannot reach another expert through what tells them apart.
        assert ask("stories-math", vllm_xargs={"expert": 1}, cache_salt="expert-1") == texts["stories-math"]


def greedy(checkpoint: Checkpoint, prompt: str, tokens: int) -> str:
    """What transformers writes after a prompt."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :]
    return str(tokenizer.decode(made, skip_special_tokens=True)).strip()


@pytest.fixture(scope="module")
def adapted(shared_store: Store, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Checkpoint]]:
    """A composite of a base and two adapters of it."""
    folder = tmp_path_factory.mktemp("adapters")
    base = MODELS / "stories"
    models = {"base": inspect_checkpoint("base", base, shared_store)}
    for number, name in enumerate(("math", "code")):
        make_adapter(folder / name, base, seed=number)
        reference = ModelReference(model=str(base), adapter=str(folder / name))
        models[name] = inspect_checkpoint(name, reference, shared_store)
        make_whole(models[name], shared_store)
    experts = tuple(
        Expert(id=name, checkpoint=one, members=(name,), examples={"math": MATH, "code": CODE}.get(name, ()), reason="")
        for name, one in models.items()
    )
    mixture = MixtureSection(router=RouterSection(kind="fixed", abstain_to="math"))
    return build_composite("adapted", experts, {}, mixture, shared_store, NOT_ASKED), models


def test_adapters_of_one_base_share_an_engine(adapted: tuple[Path, dict[str, Checkpoint]]) -> None:
    if ENGINES.get("vllm").missing():
        pytest.skip("vLLM is not installed")
    composite = Composite.open(adapted[0])
    [place] = places_of(composite, ServeSection())
    assert place.experts == ("base", "math", "code")
    assert place.checkpoint.path == str(MODELS / "stories")
    assert "--enable-lora" in place.arguments
    apart = places_of(composite, ServeSection(colocate="never"))
    assert [one.experts for one in apart] == [("base",), ("math",), ("code",)]


@pytest.mark.slow
def test_an_engine_of_adapters_answers_as_the_folded_models_do(
    adapted: tuple[Path, dict[str, Checkpoint]], tmp_path: Path
) -> None:
    if ENGINES.get("vllm").missing():
        pytest.skip("vLLM is not installed")
    directory, models = adapted
    texts = {}
    with Server(directory, ServeSection(port=0, kv_cache_mb=64), tmp_path) as server:
        assert len(server.supervisor.engines) == 1
        for name in models:
            body = {"model": name, "prompt": MATH[0], "max_tokens": 12, "temperature": 0}
            answer = httpx.post(f"{server.endpoint.url}/v1/completions", json=body, timeout=60)
            texts[name] = answer.json()["choices"][0]["text"]
            assert answer.headers["x-composer-expert"] == name
    for name, checkpoint in models.items():
        assert texts[name].strip() == greedy(checkpoint, MATH[0], 12), name
    assert len(set(texts.values())) == 3, "they are three models"
