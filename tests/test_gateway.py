"""The gateway before engines that do as they are told: what is passed on, what is refused, and what happens when one is
down."""

import asyncio
import json
import os
import signal
import socket
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import openai
import psutil
import pytest
from hypothesis import HealthCheck, given, settings

from composer.artefacts import Store
from composer.errors import ServeError
from composer.serving.engines import ENGINES
from composer.serving.engines.machine import Gpu
from composer.serving.keys import KeyFile, Keyring, make_key, remove_key
from composer.serving.server import Server
from composer.serving.settings import Limits, ServeSection
from composer.zoo import Checkpoint
from tests.conftest import children, survivors
from tests.test_routers import CODE, MATH
from tests.test_serving import composite_of

LIMITS = Limits(requests=40, body_mb=0.2, read_seconds=4.0, answer_seconds=3.0, sequences=16)
ENGINES.register("stand_in", "tests.stand_in:engine")


def serve(directory: Path, logs: Path, **settings: Any) -> Server:
    return Server(directory, ServeSection(engine="stand_in", port=0, drain_seconds=2, **settings), logs)


@pytest.fixture(scope="module")
def directory(quick: dict[str, Checkpoint], shared_store: Store) -> Path:
    return composite_of(quick, shared_store, "stories-math", "script-code")


@pytest.fixture(scope="module")
def server(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(directory, tmp_path_factory.mktemp("logs"), limits=LIMITS) as running:
        yield running


def post(server: Server, body: Any, path: str = "completions", **options: Any) -> httpx.Response:
    return httpx.post(f"{server.endpoint.url}/v1/{path}", json=body, timeout=30, **options)


def seen(server: Server, expert: str) -> dict[str, int]:
    engine = server.supervisor._seats[expert]
    found: dict[str, int] = httpx.get(f"{engine.url}/seen").json()
    return found


def eventually(check: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def refusal(answer: httpx.Response, status: int, *words: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    for word in words:
        assert word in error["message"]
    return error


def test_what_the_gateway_does_not_know_is_passed_on_untouched(server: Server) -> None:
    extra = {
        "messages": [{"role": "user", "content": MATH[0]}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "tool_choice": "auto",
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
        "logprobs": True,
        "seed": 2**53,
        "temperature": 0.1,
        "something": {"new": [1, 2.5, None, "é"]},
    }
    answer = post(server, {"model": "mix", **extra}, "chat/completions")
    assert answer.headers["x-composer-expert"] == "stories-math"
    assert answer.json()["echoed"].pop("model") == server.supervisor._seats["stories-math"].place.models["stories-math"]
    assert {key: value for key, value in answer.json()["echoed"].items() if key != "model"} == extra


@pytest.mark.parametrize("how", ["model", "header"])
def test_a_request_may_name_its_expert(server: Server, how: str) -> None:
    body, headers = {"model": "mix", "prompt": MATH[0]}, {}
    if how == "model":
        body["model"] = "script-code"
    else:
        headers["x-composer-expert"] = "script-code"
    answer = post(server, body, headers=headers)
    assert answer.headers["x-composer-expert"] == "script-code"
    assert "x-composer-margin" not in answer.headers
    refusal(post(server, {"model": "script-cod", "prompt": "a"}), 404, "did you mean 'script-code'")
    assert httpx.get(f"{server.endpoint.url}/v1/models/script-code").json()["id"] == "script-code"
    refusal(httpx.get(f"{server.endpoint.url}/v1/models/nobody"), 404, "does not exist")


def test_a_route_is_told_without_generating(server: Server) -> None:
    before = seen(server, "stories-math")["requests"]
    answer = post(server, {"messages": [{"role": "user", "content": MATH[0]}]}, "route").json()["data"][0]
    assert (answer["expert"], answer["reason"]) == ("stories-math", "likeliest")
    assert set(answer["scores"]) == {"stories-math", "script-code"}
    assert seen(server, "stories-math")["requests"] == before
    refusal(post(server, {"input": 3}, "route"), 400, "'input' must be")


def test_tokens_are_passed_on_as_they_come(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.endpoint.url}/v1", api_key="none", max_retries=0)
    times = []
    for chunk in client.completions.create(model="mix", prompt=MATH[0] + " tokens 5 slow 0.15", stream=True):
        if chunk.choices:
            times.append(time.monotonic())
    assert len(times) == 5
    assert times[-1] - times[0] > 0.4, "one by one, not all at the end"


def test_who_goes_away_stops_the_engine(server: Server) -> None:
    before = seen(server, "stories-math")
    for stream in (True, False):
        with pytest.raises(httpx.ReadTimeout):
            body = {"model": "stories-math", "prompt": "slow 2 tokens 50", "stream": stream}
            if stream:
                with httpx.stream("POST", f"{server.endpoint.url}/v1/completions", json=body, timeout=0.3) as answer:
                    for _ in answer.iter_bytes():
                        pass
            else:
                httpx.post(f"{server.endpoint.url}/v1/completions", json=body, timeout=0.3)
    eventually(lambda: seen(server, "stories-math")["cancelled"] == before["cancelled"] + 2)
    eventually(lambda: seen(server, "stories-math")["open"] == 0)


def test_what_is_too_much_is_refused(server: Server) -> None:
    url = f"{server.endpoint.url}/v1/completions"
    refusal(httpx.post(url, content=b"{" * 300_000), 413, "larger than 0.2 MB")
    refusal(httpx.post(url, content=(b" " * 10_000 for _ in range(40))), 413, "larger than 0.2 MB")
    refusal(post(server, {"model": "mix", "prompt": "a", "n": 10**9}), 400, "answers in one request")
    refusal(post(server, {"model": "mix", "prompt": ["a", "b", "c"], "n": 6}), 400, "18 answers", "at most 16")
    refusal(post(server, {"model": "mix", "prompt": "a", "n": "many"}), 400, "'n' must be a whole number")
    refusal(post(server, {"model": "mix", "prompt": MATH[0] + " slow 9"}), 504, "within 3 s")


def test_what_cannot_be_read_is_refused(server: Server) -> None:
    url = f"{server.endpoint.url}/v1/completions"
    for content in (b"{nope", b'{"prompt": "\xff\xfe"}', b'{"prompt": "\\ud800"}', b"[]", b""):
        refusal(httpx.post(url, content=content), 400, "the body")
    for body in ({}, {"prompt": 3}, {"prompt": []}, {"prompt": [1, 2]}, {"prompt": {"a": 1}}, {"prompt": [None]}):
        refusal(post(server, {"model": "mix", **body}), 400, "'prompt' must be")
    for messages in (None, "hi", [], [3], [{"role": "user"}], [{"role": "user", "content": 4}]):
        refusal(post(server, {"messages": messages}, "chat/completions"), 400, "'messages'")
    refusal(httpx.get(f"{server.endpoint.url}/v1/nothing"), 404, "there is no /v1/nothing")
    refusal(httpx.get(url), 405, "GET is not for")
    assert (
        post(server, {"model": "mix", "prompt": MATH[0] + " too long"}).json()["error"]["message"] == "context length"
    )


def test_an_engines_own_faults_are_not_shown(server: Server) -> None:
    answer = post(server, {"model": "stories-math", "prompt": "fail"})
    refusal(answer, 502, "the engine of expert 'stories-math' failed (500)")
    assert "/home" not in answer.text


def test_slow_clients_are_sent_away(server: Server) -> None:
    host, port = server.endpoint.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\n")
        began = time.monotonic()
        assert slow.recv(1000) == b"", "a header that never ends"
        assert time.monotonic() - began < 9
    with socket.create_connection((host, int(port)), timeout=10) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert b"408" in slow.recv(1000).split(b"\r\n")[0], "a body that never ends"


def test_more_than_it_takes_are_told_to_come_again(server: Server) -> None:
    async def many() -> list[int]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            body = {"model": "stories-math", "prompt": "tokens 3 slow 0.5", "stream": True}

            async def one() -> int:
                async with session.post(f"{server.endpoint.url}/v1/completions", json=body) as answer:
                    content = await answer.read()
                    if answer.status == 200:
                        assert b"[DONE]" in content
                    else:
                        assert answer.headers["retry-after"] == "1"
                    return answer.status

            return await asyncio.gather(*(one() for _ in range(1000)))

    statuses = asyncio.run(many())
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 40
    assert httpx.get(f"{server.endpoint.url}/health").status_code == 200, "it is not turned away"
    assert post(server, {"model": "mix", "prompt": MATH[0]}).status_code == 200


def test_other_names_for_this_machine_are_not_answered(server: Server) -> None:
    url = f"{server.endpoint.url}/v1/models"
    port = server.endpoint.url.rpartition(":")[2]
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", "[::1]:80"):
        assert httpx.get(url, headers={"host": host}).status_code == 200
    for host in ("evil.example", "127.0.0.1.evil.example", "[evil]", ""):
        refusal(httpx.get(url, headers={"host": host}), 403, "its own machine")


def test_metrics_count_what_happened(server: Server) -> None:
    def metric(text: str, start: str) -> float:
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(start))

    before = httpx.get(f"{server.endpoint.url}/metrics").text
    post(server, {"model": "mix", "prompt": CODE[0]})
    post(server, {"model": "mix", "prompt": CODE[0] + " tokens 7", "stream": True})
    after = httpx.get(f"{server.endpoint.url}/metrics").text
    for start, more in (
        ('composer_requests_total{expert="script-code",path="/v1/completions",status="200"}', 2),
        ('composer_routed_total{expert="script-code"', 2),
        ('composer_tokens_total{expert="script-code",kind="completion"}', 2 + 7),
        ('composer_first_byte_seconds_count{expert="script-code"', 2),
        ('composer_routing_margin_count{expert="script-code"', 2),
    ):
        assert metric(after, start) == metric(before, start) + more, start
    assert metric(after, 'composer_engine_up{expert="script-code"}') == 1


def test_what_is_written_down_is_what_it_does(server: Server) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    page = httpx.get(f"{server.endpoint.url}/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/route", "/v1/models", "/health"} <= set(page["paths"])
    schema = schemathesis.openapi.from_url(f"{server.endpoint.url}/openapi.json")
    for operation in schema.get_all_operations():
        if operation.ok().path == "/health":
            continue  # 503 while an engine is down is what it is for
        # Whether a well-formed question for an answer can be answered is for the engine to say.
        asks = operation.ok().path.endswith("completions")
        excluded = [schemathesis.checks.CHECKS.get_one("positive_data_acceptance")] if asks else []

        conform(operation.ok().as_strategy(), excluded)


def conform(cases: Any, excluded: list[Any]) -> None:
    @given(case=cases)
    @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    def check(case: Any) -> None:
        case.call_and_validate(headers={"host": "localhost"}, excluded_checks=excluded)

    check()


def test_keys_are_kept_as_hashes_and_open_the_door(directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    with pytest.raises(ServeError, match=r"listening on 0.0.0.0 needs an API key.*model-composer keys add"):
        serve(directory, tmp_path, host="0.0.0.0", keys=str(file)).__enter__()  # noqa: S104
    key = make_key(file, "me")
    other = make_key(file, "you")
    assert key not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with pytest.raises(ServeError, match="there is a key named 'me'"):
        make_key(file, "me")
    with serve(directory, tmp_path, require_key=True, keys=str(file)) as server:
        url = f"{server.endpoint.url}/v1/models"
        error = refusal(httpx.get(url), 401, "an API key is needed")
        assert error["type"] == "authentication_error"
        for wrong in (f"Bearer {key}x", "Bearer  x", f"Basic {key}", key, "Bearer \xff"):
            refusal(httpx.get(url, headers={"authorization": wrong.encode("latin-1")}), 401)
        for right in (key, other):
            assert httpx.get(url, headers={"authorization": f"Bearer {right}"}).status_code == 200
        assert httpx.get(f"{server.endpoint.url}/health").status_code == 200, "balancers have no key"
        refusal(httpx.get(f"{server.endpoint.url}/metrics"), 401)
        own = server.endpoint.key
        assert httpx.get(url, headers={"authorization": f"Bearer {own}"}).status_code == 200, "evaluation comes in"
        assert own not in server.endpoint.model_dump_json() + repr(server.endpoint) + file.read_text()
        remove_key(file, "you")
        refusal(httpx.get(url, headers={"authorization": f"Bearer {other}"}), 401, "not known")
        engine = server.supervisor.engines[0]
        assert httpx.post(f"{engine.url}/v1/completions", json={"prompt": "a"}).status_code == 401, (
            "engines have theirs"
        )
    file.write_text("[]")
    with pytest.raises(ServeError, match="is no file of API keys"):
        KeyFile(file)
    assert Keyring().opens("x") is None


@pytest.mark.parametrize("when_down", ["fallback", "unavailable"])
def test_an_engine_that_dies_is_brought_up_again_while_the_others_serve(
    directory: Path, tmp_path: Path, when_down: Any
) -> None:
    before = {one.pid for one in children(os.getpid())}
    with serve(directory, tmp_path, when_down=when_down) as server:
        processes = [one for one in children(os.getpid()) if one.pid not in before]
        engine = server.supervisor._seats["script-code"]
        first = engine.port
        assert post(server, {"model": "mix", "prompt": CODE[0]}).headers["x-composer-expert"] == "script-code"
        victims = [one for one in processes if str(first) in " ".join(one.cmdline())]
        assert len(victims) == 2, "guard and engine"
        for one in victims:
            one.send_signal(signal.SIGKILL)
        eventually(lambda: server.supervisor.states()["script-code"] == "restarting")
        health = httpx.get(f"{server.endpoint.url}/health")
        assert (health.status_code, health.json()["status"]) == (503, "degraded")
        assert health.json()["engines"] == {"stories-math": "ok", "script-code": "restarting"}
        assert post(server, {"model": "mix", "prompt": MATH[0]}).headers["x-composer-expert"] == "stories-math"
        routed = post(server, {"model": "mix", "prompt": CODE[0]})
        if when_down == "fallback":
            assert routed.headers["x-composer-expert"] == "stories-math"
            assert routed.headers["x-composer-instead-of"] == "script-code"
        else:
            refusal(routed, 503, "the engine of expert 'script-code' does not answer; try again in 10 s")
        named = post(server, {"model": "script-code", "prompt": "a"})
        refusal(named, 503, "script-code")
        assert int(named.headers["retry-after"]) > 0
        eventually(lambda: server.supervisor.states()["script-code"] == "ready", 30)
        assert engine.restarts == 1
        assert post(server, {"model": "mix", "prompt": CODE[0]}).headers["x-composer-expert"] == "script-code"
        assert 'composer_engine_restarts{engine="script-code"} 1.0' in httpx.get(f"{server.endpoint.url}/metrics").text
        assert any("script-code: died" in note for note in server.supervisor.notes)
        assert any("script-code: answers again" in note for note in server.supervisor.notes)
        left = [one for one in children(os.getpid()) if one.pid not in before]
    assert not survivors(left)


def test_an_engine_that_dies_in_mid_answer_says_so(directory: Path, tmp_path: Path) -> None:
    with serve(directory, tmp_path) as server:
        body = {"model": "stories-math", "prompt": "break", "stream": True}
        with httpx.stream("POST", f"{server.endpoint.url}/v1/completions", json=body, timeout=10) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert len(lines) == 3
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["message"].endswith("in the middle of the answer")
        eventually(lambda: server.supervisor.states()["stories-math"] == "ready", 30)
        answer = post(server, {"model": "mix", "prompt": MATH[0] + " die"})
        assert answer.headers["x-composer-expert"] == "script-code" or answer.status_code == 503
        eventually(lambda: server.supervisor.states()["stories-math"] == "ready", 30)


def test_an_engine_that_keeps_dying_is_given_up(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("FIRST_PAUSE", 0.01), ("TRIES", 2)):
        monkeypatch.setattr(f"composer.serving.supervisor.{name}", value)
    with serve(directory, tmp_path) as server:
        engine = server.supervisor._seats["script-code"]
        engine.place = replace(engine.place, arguments=("no such thing",), kind=_Broken())
        assert engine.process is not None
        for one in psutil.Process(engine.process.pid).children(recursive=True):
            one.kill()
        eventually(lambda: server.supervisor.states()["script-code"] == "failed", 30)
        assert "given up after 2 restarts" in server.supervisor.notes[-1]
        answer = post(server, {"model": "script-code", "prompt": "a"})
        refusal(answer, 503)
        assert answer.headers["retry-after"] == "60"


class _Broken:
    name, scores_prompts, overhead = "broken", True, 0

    def command(self, checkpoint: Checkpoint, settings: Any) -> list[str]:
        return ["/bin/false"]

    def environment(self, settings: Any) -> dict[str, str]:
        return {}


@pytest.mark.parametrize("program", ["import os; os.kill(os.getpid(), 9)", "raise MemoryError('out of memory')"])
def test_an_engine_that_finds_no_memory_says_what_it_asked_for_and_what_to_change(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    command = [sys.executable, "-c", program]
    monkeypatch.setattr(ENGINES.get("stand_in"), "command", lambda checkpoint, settings: command, raising=False)
    with pytest.raises(ServeError) as refused:
        serve(directory, tmp_path).__enter__()
    message = str(refused.value)
    assert "not enough memory: it takes about 0.3 GB" in message
    assert "float32 and 256 MB key-value cache" in message
    assert "try serve.colocate=always, serve.dtype=bfloat16" in message


def test_an_engine_that_never_gets_ready_is_given_up_in_time(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(ENGINES.get("stand_in"), "command", lambda checkpoint, settings: command, raising=False)
    before = {one.pid for one in children(os.getpid())}
    with pytest.raises(ServeError, match=r"was not ready within 1 s; raise serve.start_timeout"):
        serve(directory, tmp_path, start_timeout=1).__enter__()
    assert not survivors([one for one in children(os.getpid()) if one.pid not in before])


def test_engines_that_do_not_fit_together_take_turns(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-ins refuse to answer while they sleep."""
    monkeypatch.setattr("composer.serving.places.gpus", lambda: [Gpu(0, 1 << 30, 1 << 30)])
    with serve(directory, tmp_path) as server:
        assert server.supervisor.sharing() == [["stories-math", "script-code"]]
        for prompt in (MATH[0], CODE[0], MATH[1], CODE[1]):
            assert post(server, {"model": "mix", "prompt": prompt}).status_code == 200
        with httpx.stream(
            "POST",
            f"{server.endpoint.url}/v1/completions",
            json={"model": "stories-math", "prompt": "tokens 4 slow 0.3", "stream": True},
        ) as answer:
            began = time.monotonic()
            assert post(server, {"model": "script-code", "prompt": "a"}).status_code == 200
            assert time.monotonic() - began > 0.8, "the stream was not cut off"
            assert "[DONE]" in answer.read().decode()
        engine = server.supervisor._seats["stories-math"]
        assert (seen(server, "stories-math")["asleep"], seen(server, "script-code")["asleep"]) == (1, 0)
        assert engine.process is not None
        for one in psutil.Process(engine.process.pid).children(recursive=True):
            one.kill()
        eventually(lambda: engine.restarts == 1 and server.supervisor.states()["stories-math"] == "ready", 30)
        assert seen(server, "script-code")["asleep"] == 1, "it made room"
        for prompt in (CODE[0], MATH[0]):
            assert post(server, {"model": "mix", "prompt": prompt}).status_code == 200


def test_answers_that_have_begun_come_to_their_end_when_it_stops(directory: Path, tmp_path: Path) -> None:
    server = serve(directory, tmp_path).__enter__()
    body = {"model": "stories-math", "prompt": "tokens 4 slow 0.3", "stream": True}
    with httpx.stream("POST", f"{server.endpoint.url}/v1/completions", json=body, timeout=10) as answer:
        chunks = answer.iter_lines()
        next(chunks)
        import threading

        stopping = threading.Thread(target=server.stop)
        stopping.start()
        rest = [line for line in chunks if line]
        stopping.join()
    assert rest[-1] == "data: [DONE]"
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.endpoint.url}/health")


def test_an_expert_may_be_served_elsewhere(
    server: Server, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = server.supervisor._seats["script-code"]
    remote = {"url": f"{elsewhere.url}/v1", "key": "ELSEWHERE_KEY"}
    with pytest.raises(ServeError, match=r"serve.remote.script-code.key: the environment has no ELSEWHERE_KEY"):
        serve(directory, tmp_path, remote={"script-code": remote}).__enter__()
    monkeypatch.setenv("ELSEWHERE_KEY", elsewhere.secret)
    with pytest.raises(ServeError, match=r"does not serve 'other'; it serves .*set serve.remote.script-code.model"):
        serve(directory, tmp_path, remote={"script-code": {**remote, "model": "other"}}).__enter__()
    with pytest.raises(ServeError, match=r"serve\.remote names 'nobody'"):
        serve(directory, tmp_path, remote={"nobody": remote}).__enter__()
    with serve(directory, tmp_path, remote={"script-code": remote}) as here:
        assert [engine.place.name for engine in here.supervisor.engines] == ["stories-math"]
        answer = post(here, {"model": "mix", "prompt": CODE[0]})
        assert answer.headers["x-composer-expert"] == "script-code"
        assert answer.json()["choices"][0]["text"].startswith("script-code")
        assert here.endpoint.engines["script-code"] == "remote"
