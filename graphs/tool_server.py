"""The tools of a conversation for programs: an MCP server on standard input and output."""

import asyncio
from typing import Any

import mcp_types as types
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server
from pydantic import ValidationError

from composer import __version__
from composer.chat.calls import CALL, described
from composer.errors import ComposerError
from graphs.background import Background
from graphs.conversation import Conversation

PATIENCE = 40.0
"""Seconds a call waits for its end before it says that the work goes on; clients give up after a minute."""
ANSWER = "answer"
READ_ONLY = (
    "list_models",
    "inspect_model",
    "compare_models",
    "show_draft",
    "status",
    "route",
    "explain",
    "evidence",
    "help",
)
INSTRUCTIONS = (
    "Composes language models out of a zoo of checkpoints. Draft a recipe, show the person its plan, and give 'answer' "
    "their yes or no; nothing is made before. Long work goes on by itself: ask 'status' for it."
)


class ToolServer:
    """One conversation, and the one thing it works on."""

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self.work = Background(conversation)

    def tools(self) -> list[types.Tool]:
        """Return the tools as the protocol describes them."""
        listed = [
            types.Tool(
                name=one["function"]["name"],
                description=one["function"]["description"],
                input_schema=one["function"]["parameters"],
                annotations=types.ToolAnnotations(read_only_hint=one["function"]["name"] in READ_ONLY),
            )
            for one in described()
        ]
        schema = {"type": "object", "properties": {"text": {"type": "string", "maxLength": 4000}}, "required": ["text"]}
        about = "Give the person's answer to what is asked: 'yes' to a plan makes it, 'no' does not."
        hints = types.ToolAnnotations(read_only_hint=False, destructive_hint=True)
        return [*listed, types.Tool(name=ANSWER, description=about, input_schema=schema, annotations=hints)]

    def call(self, name: str, arguments: dict[str, Any]) -> tuple[str, bool]:
        """Call a tool; return what it says, and whether that is an error."""
        if self.work.running:
            if name == "cancel":
                return ("stopping" if self.conversation.cancel() else "nothing can be stopped yet"), False
            if name == "status":
                return self._waited(), False
            return f"{self.work.doing} is going on; ask 'status', or 'cancel' it", True
        try:
            if name == ANSWER:
                if self.conversation.waiting is None:
                    return "nothing waits for an answer", True
                work = self.conversation.say(str(arguments.get("text", "")))
            else:
                work = self.conversation.call(CALL.validate_python({**arguments, "tool": name}))
        except (ValidationError, ComposerError) as error:
            return str(error), True
        self.work.start(work)
        return self._waited(), any(one.code for one in self.work.told)

    def _waited(self) -> str:
        """Return what has been said once the work ends, or how far it is."""
        if self.work.wait(PATIENCE):
            return self.work.words or "done"
        return f"{self.work.words}\n(working on {self.work.doing}; ask 'status')".strip()


def serve(conversation: Conversation) -> None:
    """Serve the tools on standard input and output until that is closed."""
    tools = ToolServer(conversation)

    async def list_tools(context: Any, params: Any) -> types.ListToolsResult:
        return types.ListToolsResult(tools=tools.tools())

    async def call_tool(context: Any, params: types.CallToolRequestParams) -> types.CallToolResult:
        text, wrong = await asyncio.to_thread(tools.call, params.name, params.arguments or {})
        return types.CallToolResult(content=[types.TextContent(type="text", text=text)], is_error=wrong)

    async def run() -> None:
        server = Server(
            "model-composer",
            version=__version__,
            instructions=INSTRUCTIONS,
            on_list_tools=list_tools,
            on_call_tool=call_tool,
        )
        async with stdio_server() as (reads, writes):
            await server.run(reads, writes, server.create_initialization_options())

    asyncio.run(run())
