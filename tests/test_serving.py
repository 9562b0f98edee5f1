"""Serving: real engines, a real gateway, a real client, and nothing left behind."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import torch

from composer.artefacts import Store
from composer.errors import EvaluationError, ServeError
from composer.evaluation.endpoint import ComposedModel, _likelihood
from composer.evaluation.in_process import score_checkpoint
from composer.evaluation.tasks import load_split, run_tasks
from composer.mixture import Composite, Expert, build_composite
from composer.mixture.settings import MixtureSection, RouterSection
from composer.serving.engines import ENGINES
from composer.serving.gateway import _user_text
from composer.serving.places import places_of
from composer.serving.server import Server
from composer.serving.settings import ServeSection
from composer.zoo import Checkpoint
from tests.conftest import NOT_ASKED, QUICKSTART, children, survivors, take_signals
from tests.test_routers import CODE, MATH

GUARD = Path(__file__).resolve().parent.parent / "composer" / "serving" / "guard.py"


def composite_of(quick: dict[str, Checkpoint], store: Store, *names: str) -> Path:
    """A composite of whole models."""
    examples = {"stories-math": MATH, "script-code": CODE}
    experts = tuple(
        Expert(id=name, checkpoint=quick[name], members=(name,), examples=examples[name], reason="a test")
        for name in names
    )
    router = RouterSection(abstain_to=names[0])
    return build_composite("mix", experts, {}, MixtureSection(router=router), store, NOT_ASKED)


@pytest.fixture(scope="module")
def served(
    quick: dict[str, Checkpoint], shared_store: Store, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Two experts of two architectures behind one endpoint, by whatever engine the machine has."""
    directory = composite_of(quick, shared_store, "stories-math", "script-code")
    section = ServeSection(port=0, kv_cache_mb=64)
    with Server(directory, section, tmp_path_factory.mktemp("logs")) as server:
        yield server
        engines = children(os.getpid())
    assert len(engines) >= 4, "two guards, two engines"
    assert not survivors(engines)


@pytest.fixture(scope="module")
def client(served: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.endpoint.url}/v1", api_key="none", max_retries=0)


@pytest.mark.slow
def test_it_listens_on_loopback_only(served: Server) -> None:
    ports = {int(served.endpoint.url.rpartition(":")[2]), *(e.port for e in served.supervisor.engines)}
    listening = {
        (connection.laddr.ip, connection.laddr.port)
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port in ports
    }
    assert listening == {("127.0.0.1", port) for port in ports}


@pytest.mark.slow
def test_models_and_health(served: Server, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["mix", "stories-math", "script-code"]
    health = httpx.get(f"{served.endpoint.url}/health").json()
    assert health == {"status": "ok", "engines": {"stories-math": "ok", "script-code": "ok"}}


@pytest.mark.slow
def test_a_prompt_finds_its_expert(served: Server, client: openai.OpenAI) -> None:
    for text, expert in ((MATH[0], "stories-math"), (CODE[0], "script-code")):
        raw = client.completions.with_raw_response.create(model="mix", prompt=text, max_tokens=5, temperature=0)
        assert raw.headers["x-composer-expert"] == expert
        assert float(raw.headers["x-composer-margin"]) > 0
        named = client.completions.create(model=expert, prompt=text, max_tokens=5, temperature=0)
        assert raw.parse().choices[0].text == named.choices[0].text
        routed = httpx.post(f"{served.endpoint.url}/v1/route", json={"input": text}).json()["data"][0]
        assert routed["expert"] == expert


@pytest.mark.slow
def test_what_serving_takes_is_measured(served: Server) -> None:
    vitals = served.vitals()
    assert vitals is not None
    assert set(vitals.paces) == set(served.endpoint.engines)
    assert all(pace.first_token_ms > 0 and pace.tokens_per_second > 0 for pace in vitals.paces.values())
    assert set(vitals.memory_mb) == {engine.place.name for engine in served.supervisor.engines}
    assert all(100 < size < 8000 for size in vitals.memory_mb.values())
    assert 0 < vitals.route_ms < 5000


def test_langchain_and_curl_talk_to_it(served: Server) -> None:
    from langchain_openai import ChatOpenAI

    url = f"{served.endpoint.url}/v1"
    chat = ChatOpenAI(base_url=url, api_key="none", model="mix", max_completion_tokens=8, temperature=0)  # type: ignore[arg-type]
    whole = chat.invoke(MATH[1])
    assert isinstance(whole.content, str)
    assert "".join(str(part.content) for part in chat.stream(MATH[1])) == whole.content
    body = json.dumps({"model": "mix", "messages": [{"role": "user", "content": MATH[1]}], "max_tokens": 8,
                       "temperature": 0})  # fmt: skip
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    command = [curl, "-s", "-i", f"{url}/chat/completions", "-H", "Content-Type: application/json", "-d", body]
    head, _, answer = subprocess.run(command, capture_output=True, text=True).stdout.partition("\n\n")
    assert "x-composer-expert: stories-math" in head
    assert json.loads(answer)["choices"][0]["message"]["content"] == whole.content


@pytest.mark.slow
def test_chat_streams_token_by_token(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": MATH[1]}]
    whole = client.chat.completions.create(model="mix", messages=messages, max_tokens=12, temperature=0)  # type: ignore[arg-type]
    stream = client.chat.completions.create(
        model="mix",
        messages=messages,
        max_tokens=12,
        temperature=0,
        stream=True,  # type: ignore[arg-type]
    )
    parts = [chunk.choices[0].delta.content for chunk in stream if chunk.choices and chunk.choices[0].delta.content]
    assert len(parts) > 1
    assert "".join(parts) == whole.choices[0].message.content


@pytest.mark.slow
def test_prompts_of_one_request_go_to_different_experts_and_come_back_in_order(client: openai.OpenAI) -> None:
    prompts = [CODE[0], MATH[0], CODE[1]]
    together = client.completions.create(model="mix", prompt=prompts, max_tokens=6, temperature=0)
    alone = [client.completions.create(model="mix", prompt=one, max_tokens=6, temperature=0) for one in prompts]
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    assert [choice.text for choice in together.choices] == [one.choices[0].text for one in alone]


@pytest.mark.slow
def test_a_prompt_that_is_too_long_is_routed_and_refused_in_words(client: openai.OpenAI) -> None:
    for call in (
        lambda text: client.completions.create(model="mix", prompt=text, max_tokens=1),
        lambda text: client.chat.completions.create(
            model="mix", messages=[{"role": "user", "content": text}], max_tokens=1
        ),
    ):
        with pytest.raises(openai.BadRequestError, match=r"context length|longer than|max_model_len") as refused:
            call(" ".join(MATH * 200))
        assert refused.value.response.headers["x-composer-expert"] == "stories-math"


@pytest.mark.slow
def test_an_empty_prompt_is_routed_and_what_its_engine_says_is_passed_on(served: Server) -> None:
    body = {"model": "mix", "messages": [{"role": "user", "content": ""}], "max_tokens": 2}
    answer = httpx.post(f"{served.endpoint.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.headers["x-composer-expert"] in ("stories-math", "script-code")
    assert answer.status_code == 200 or "empty" in answer.json()["error"]["message"]


def test_what_of_a_chat_is_read_is_for_the_policy_to_say() -> None:
    parts = [{"type": "text", "text": "first"}, {"type": "image_url", "image_url": {}}]
    body = {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "last"},
        ]
    }
    assert _user_text(body, "last") == "last"
    assert _user_text(body, "first") == "first\n"
    assert _user_text(body, "conversation") == "first\n\nlast"


@pytest.mark.slow
def test_bad_requests_get_openais_error_shape(served: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="the model 'mixx' does not exist; did you mean 'mix'"):
        client.completions.create(model="mixx", prompt="a")
    with pytest.raises(openai.BadRequestError, match="name an expert"):
        client.completions.create(model="mix", prompt=[1, 2, 3])
    with pytest.raises(openai.BadRequestError, match="no user message"):
        client.chat.completions.create(model="mix", messages=[{"role": "system", "content": "x"}])
    broken = httpx.post(f"{served.endpoint.url}/v1/completions", content=b"{nope")
    assert broken.status_code == 400
    assert set(broken.json()["error"]) == {"message", "type", "param", "code"}
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="stories-math", prompt="a", max_tokens=100_000)


@pytest.mark.slow
def test_scores_through_the_endpoint_are_those_in_process(
    served: Server, quick: dict[str, Checkpoint], shared_store: Store
) -> None:
    split = load_split(["quick_math", "quick_code"], "held_out", include=str(QUICKSTART / "tasks"), limit=24)
    composite = Composite.open(served.directory)
    model = ComposedModel(served.endpoint, composite)
    together = run_tasks(model, split, "mix")
    alone = {name: score_checkpoint(quick[name], split, shared_store) for name in ("stories-math", "script-code")}
    for task in together.tasks:
        counts = model.routed[task.task]
        assert sum(counts.values()) == len(task.items)
        for item, value in task.items.items():
            assert value in {scores.task(task.task).items[item] for scores in alone.values()}
    if served.endpoint.scores_prompts:
        from lm_eval.models.huggingface import HFLM

        hf = HFLM(pretrained=quick["stories-math"].path, dtype="float32", device="cpu")
        items = split.tasks[0].task.instances[:16]
        ours = model.experts["stories-math"].loglikelihood(items)
        for (mine, greedy), (theirs, also) in zip(ours, hf.loglikelihood(items), strict=True):
            assert mine == pytest.approx(theirs, abs=2e-3)
            assert greedy == also


def test_a_server_that_ignores_echo_is_found_out() -> None:
    with pytest.raises(EvaluationError, match="it ignores 'echo'"):
        _likelihood({"logprobs": {"token_logprobs": [None]}}, prompt=4, continuation=2, expert="e")
    with pytest.raises(EvaluationError, match="it ignores 'echo'"):
        _likelihood({"logprobs": None}, prompt=4, continuation=2, expert="e")


@pytest.mark.slow
def test_transformers_serve_steps_in(quick: dict[str, Checkpoint], shared_store: Store, tmp_path: Path) -> None:
    directory = composite_of(quick, shared_store, "stories-math")
    section = ServeSection(port=0, engine="transformers")
    with Server(directory, section, tmp_path) as server:
        client = openai.OpenAI(base_url=f"{server.endpoint.url}/v1", api_key="none", max_retries=0)
        answer = client.completions.create(model="mix", prompt="Once upon a time", max_tokens=8, temperature=0)
        assert answer.choices[0].text
        split = load_split(["quick_math"], "held_out", include=str(QUICKSTART / "tasks"), limit=8)
        composite = Composite.open(directory)
        assert not server.endpoint.scores_prompts
        together = run_tasks(ComposedModel(server.endpoint, composite), split, "mix")
        assert together.tasks == score_checkpoint(quick["stories-math"], split, shared_store).tasks


def test_a_port_in_use_is_found_before_any_engine_starts(
    quick: dict[str, Checkpoint], shared_store: Store, tmp_path: Path
) -> None:
    directory = composite_of(quick, shared_store, "stories-math")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=f"cannot listen on 127.0.0.1:{port}: .* choose another with serve.port"):
            Server(directory, ServeSection(port=port), tmp_path).__enter__()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_engine_that_dies_says_why(quick: dict[str, Checkpoint], shared_store: Store, tmp_path: Path) -> None:
    broken = quick["stories-math"].model_copy(update={"path": str(tmp_path / "gone"), "id": "gone"})
    expert = Expert(id="gone", checkpoint=broken, members=("gone",), examples=(), reason="a test")
    directory = build_composite("mix", (expert,), {}, MixtureSection(), shared_store, NOT_ASKED)
    section = ServeSection(port=0, engine="transformers")
    with pytest.raises(ServeError, match=r"the transformers engine of 'gone' (died at start|refuses)"):
        Server(directory, section, tmp_path / "logs").__enter__()


def test_a_head_size_without_a_kernel_goes_to_transformers(quick: dict[str, Checkpoint], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("only vLLM's CPU attention lacks kernels")
    (tmp_path / "config.json").write_text('{"hidden_size": 64, "num_attention_heads": 8}')
    odd = quick["stories"].model_copy(update={"path": str(tmp_path)})
    assert "no kernel for head size 8" in (ENGINES.get("vllm").unsupported(odd) or "")
    assert ENGINES.get("vllm").unsupported(quick["stories"]) is None


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_guarded_process_does_not_outlive_its_parent(how: signal.Signals) -> None:
    """Its grandchildren do not either."""
    sleep = "import time; time.sleep(300)"
    inner = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {sleep!r}]); {sleep}"
    parent = f"""
import subprocess, sys, time
guard = [sys.executable, {str(GUARD)!r}, sys.executable, "-c", {inner!r}]
subprocess.Popen(guard, stdin=subprocess.PIPE)
print("ready", flush=True)
time.sleep(300)
"""
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, preexec_fn=take_signals)
    assert process.stdout is not None
    process.stdout.readline()
    deadline = time.monotonic() + 20
    while len(children(process.pid)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    family = children(process.pid)
    assert len(family) == 3, "guard, child, grandchild"
    os.kill(process.pid, how)
    process.wait()
    assert not survivors(family)


def test_without_vllm_transformers_steps_in_or_the_error_says_so(
    quick: dict[str, Checkpoint], shared_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # what an import system says of a module that is not there
    directory = composite_of(quick, shared_store, "stories-math")
    with pytest.raises(ServeError, match=r"'stories-math' cannot be served: vLLM is not installed; run 'make setup'"):
        Server(directory, ServeSection(port=0, engine="vllm"), tmp_path).__enter__()
    [place] = places_of(Composite.open(directory), ServeSection())
    assert place.kind.name == "transformers"
    assert "vLLM is not installed" in (place.note or "")
