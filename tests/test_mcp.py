"""The tools of the chat over the Model Context Protocol, with the protocol's own client."""

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from composer.chat.calls import TOOLS
from tests.conftest import ROOT

pytest.importorskip("mcp")


def session(tmp_path: Path, work: Any) -> None:
    """Run some work with a client of a server in a process of its own."""
    from mcp import ClientSession, StdioServerParameters
    from mcp.client.stdio import stdio_client

    server = StdioServerParameters(
        command=sys.executable,
        args=["-m", "composer.cli", "mcp", "--zoo", str(ROOT / "recipes" / "quickstart.yaml")],
        env={**os.environ, "MODEL_COMPOSER_RUNS": str(tmp_path / "runs"), "PYTHONPATH": str(ROOT)},
        cwd=str(tmp_path),
    )

    async def run() -> None:
        async with stdio_client(server) as (reads, writes), ClientSession(reads, writes) as client:
            await client.initialize()
            await work(client)

    asyncio.run(asyncio.wait_for(run(), 240))


def text(result: Any) -> str:
    return "\n".join(one.text for one in result.content)


def test_tools_are_listed_and_called(tmp_path: Path) -> None:
    async def work(client: Any) -> None:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(tools) == {*TOOLS, "answer"}
        assert tools["answer"].annotations.destructive_hint
        assert tools["list_models"].annotations.read_only_hint
        assert "7 models" in text(await client.call_tool("list_models", {}))
        wrong = await client.call_tool("draft", {"edit": {"models": ["stories-maths"]}})
        assert wrong.is_error
        assert "did you mean 'stories-math'" in text(wrong)
        assert (await client.call_tool("rm", {})).is_error
        assert (await client.call_tool("compare_models", {"models": ["stories-math", "absent"]})).is_error
        assert (await client.call_tool("save", {"file": "/etc/x.yaml"})).is_error
        assert text(await client.call_tool("answer", {"text": "yes"})) == "nothing waits for an answer"

    session(tmp_path, work)


@pytest.mark.slow
def test_a_draft_waits_for_an_answer(tmp_path: Path) -> None:
    async def work(client: Any) -> None:
        said = text(await client.call_tool("draft", {"edit": {"models": ["stories-math", "stories-law"]}}))
        while "working on" in said:
            said = text(await client.call_tool("status", {}))
        assert "Go ahead?" in said
        assert text(await client.call_tool("answer", {"text": "no"})) == "Nothing was made."

    session(tmp_path, work)
    assert not (tmp_path / "runs" / "store" / "merged").exists()
