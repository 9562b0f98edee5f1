"""LangGraph's own server opens both graphs: its HTTP API holds a conversation, and waits for a yes.

The server does not fit into one environment with the other tools that tests need, so that it is run where one is named:

    MODEL_COMPOSER_LANGGRAPH=.../bin/langgraph pytest tests/test_langgraph_server.py
"""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import ROOT

PROGRAM = os.environ.get("MODEL_COMPOSER_LANGGRAPH", "")
pytestmark = pytest.mark.skipif(not PROGRAM, reason="MODEL_COMPOSER_LANGGRAPH names no `langgraph` with `dev`")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("langgraph")
    for name in ("langgraph.json", "pyproject.toml", "composer", "graphs", "routers"):
        (root / name).symlink_to(ROOT / name)  # it writes beside its configuration
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "MODEL_COMPOSER_RUNS": str(root / "runs"),
        "PYTHONPATH": str(ROOT),
        "LANGSMITH_TRACING": "false",
    }
    command = [PROGRAM, "dev", "--no-browser", "--no-reload", "--host", "127.0.0.1", "--port", str(port)]
    log = (root / "log").open("w")
    process = subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert process.poll() is None, Path(log.name).read_text()[-2000:]
            try:
                if httpx.get(f"{address}/ok").json()["ok"]:
                    break
            except httpx.HTTPError:
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(30)
        log.close()


def run(url: str, thread: str, **body: Any) -> dict[str, Any]:
    answer = httpx.post(f"{url}/threads/{thread}/runs/wait", json={"assistant_id": "chat", **body}, timeout=300)
    answer.raise_for_status()
    found: dict[str, Any] = answer.json()
    return found


def test_both_graphs_are_open(url: str) -> None:
    found = httpx.post(f"{url}/assistants/search", json={}).json()
    assert {one["graph_id"] for one in found} == {"chat", "compose"}
    for one in found:
        drawn = httpx.get(f"{url}/assistants/{one['assistant_id']}/graph").json()
        assert {"chat": "understand", "compose": "inspect"}[one["graph_id"]] in {node["id"] for node in drawn["nodes"]}
        assert httpx.get(f"{url}/assistants/{one['assistant_id']}/schemas").json()["context_schema"]["properties"]


@pytest.mark.slow
def test_a_conversation_waits_for_a_yes_and_composes(url: str) -> None:
    thread = httpx.post(f"{url}/threads", json={}).json()["thread_id"]
    context = {"zoo": str(ROOT / "recipes" / "quickstart.yaml")}
    listed = run(url, thread, input={"said": "what models are there?"}, context=context)
    assert "7 models" in listed["messages"][-1]["text"]
    said = "merge math and law, 4 items per task, do not serve it"
    run(url, thread, input={"said": said}, context=context)
    waiting = httpx.get(f"{url}/threads/{thread}/state").json()
    assert waiting["next"] == ["approve"]
    assert waiting["tasks"][0]["interrupts"][0]["value"]["ask"] == "Go ahead?"
    done = run(url, thread, command={"resume": "yes"}, context=context)
    assert "cannot be told apart" in done["messages"][-1]["text"] or "best single model" in done["messages"][-1]["text"]
    assert len(done["finished"]) == 1
