"""The model `composer` on the endpoint, with the official client: asked, refused, composed, asked again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import NotFoundError, OpenAI

from tests.conftest import ROOT

SAID = list[tuple[str, str]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("front")


@pytest.fixture(scope="module")
def url(root: Path) -> Iterator[str]:
    with started(root) as (address, process):
        yield address
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


class started:  # noqa: N801 - used as a context
    """A front in a process of its own."""

    def __init__(self, root: Path, *arguments: str) -> None:
        self.root, self.arguments = root, arguments

    def __enter__(self) -> tuple[str, "subprocess.Popen[str]"]:
        zoo = ROOT / "recipes" / "quickstart.yaml"
        command = [
            sys.executable,
            "-m",
            "composer.cli",
            "serve",
            *self.arguments,
            "port=0",
            "--zoo",
            str(zoo),
            "--json",
        ]
        environment = {**os.environ, "MODEL_COMPOSER_RUNS": str(self.root / "runs"), "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(command, cwd=self.root, env=environment, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(f"it ended with {self.process.wait()}")
        rest = "" if line.rstrip().endswith("}") else "".join(iter(self.process.stdout.readline, "}\n")) + "}"
        return json.loads(line + rest)["url"], self.process

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def chat(url: str, said: SAID, message: str, *, stream: bool = False) -> str:
    """Say something as chat clients do: with all that was said before."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=300)
    messages: list[Any] = [{"role": role, "content": text} for role, text in said]
    messages.append({"role": "user", "content": message})
    if stream:
        chunks = client.chat.completions.create(model="composer", messages=messages, stream=True)
        answer = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    else:
        whole = client.chat.completions.create(model="composer", messages=messages)
        assert whole.model == "composer"
        answer = whole.choices[0].message.content or ""
    said += [("user", message), ("assistant", answer)]
    return answer


def test_it_answers_in_words_and_starts_anew_with_a_first_message(url: str) -> None:
    said: SAID = []
    began = time.perf_counter()
    assert "7 models" in chat(url, said, "what models are there?")
    assert time.perf_counter() - began < 20
    assert "stories-math" in chat(url, said, "inspect the math model", stream=True)
    assert "7 models" in chat(url, [], "what models are there?")


def test_nothing_is_served_before_something_is_made(url: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    assert [one.id for one in client.models.list()] == ["composer"]
    with pytest.raises(NotFoundError, match="ask the model 'composer' for one"):
        client.chat.completions.create(model="quickstart", messages=[{"role": "user", "content": "1 + 1?"}])
    assert httpx.get(f"{url}/health").json() == {"status": "ok", "engines": {}}


@pytest.mark.parametrize(
    "body",
    [
        {"model": "composer"},
        {"model": "composer", "messages": []},
        {"model": "composer", "messages": "hello"},
        {"model": "composer", "messages": [{"role": "system", "content": "x"}]},
        {"model": "composer", "messages": [{"role": "user", "content": "list"}], "n": 3},
    ],
)
def test_what_is_no_chat_is_refused(url: str, body: dict[str, Any]) -> None:
    answer = httpx.post(f"{url}/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_it_answers_to_names_of_its_own_machine_only(url: str) -> None:
    assert httpx.get(f"{url}/v1/models", headers={"host": "evil.example"}).status_code == 403


@pytest.mark.slow
def test_a_client_composes_uses_what_was_made_and_changes_its_mind(url: str, root: Path) -> None:
    said: SAID = []
    port = url.rpartition(":")[2]  # the one that is taken, as that of a recipe would be by default
    plan = chat(url, said, f"merge math and law, 4 items per task, and serve it on port {port}")
    assert f"behind {url};" in plan
    assert plan.rstrip().endswith("Go ahead?")
    assert not (root / "runs" / "store" / "merged").exists()
    made = chat(url, said, "yes", stream=True)
    assert "merge" in made
    assert f"answers at {url}/v1" in made
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    names = [one.id for one in client.models.list()]
    assert names[0] == "composer"
    assert len(names) >= 3
    ask: Any = {"model": names[1], "messages": [{"role": "user", "content": "What is 2 + 3?"}], "max_tokens": 4}
    answer = client.chat.completions.with_raw_response.create(**ask)
    assert answer.headers["x-composer-expert"] in names
    streamed = client.chat.completions.create(**ask, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert client.completions.create(model=names[1], prompt="1 + 1 =", max_tokens=2).choices[0].text is not None
    assert httpx.get(f"{url}/health").json()["status"] == "ok"
    changed = chat(url, said, "do not merge anything")
    assert changed.rstrip().endswith("Go ahead?"), changed
    again = chat(url, said, "yes", stream=True)
    assert "stopped" in again
    assert "answers at" in again
    assert {"stories-math", "stories-law"} <= {one.id for one in client.models.list()}
