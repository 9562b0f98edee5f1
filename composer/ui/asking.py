"""Asking a served composite, and hearing which expert answers."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import orjson

from composer.errors import ServeError
from composer.mixture.composite import Composite
from composer.value import Value

if TYPE_CHECKING:
    from composer.serving.server import Endpoint

TOKENS = 96
"""Tokens of an answer, at most."""
LONGEST_PROMPT = 20_000
"""Characters."""


class Piece(Value):
    """A piece of an answer."""

    expert: str = ""
    """Who answers; with the first piece."""
    instead_of: str = ""
    """Who would have answered, were its engine up."""
    text: str = ""


def takes_chats(composite: Path) -> bool:
    """Return whether all experts know how a chat is written down; else they continue text."""
    return all(one.checkpoint.tokenizer.chat_template for one in Composite.open(composite).experts)


async def ask(endpoint: "Endpoint", model: str, prompt: str, *, chat: bool) -> AsyncIterator[Piece]:
    """Ask the composite or an expert, and yield the answer as it comes.

    Args:
        endpoint: Where it is served.
        model: The composite's name, or an expert's id.
        prompt: What is asked.
        chat: Whether it is sent as a chat.

    Raises:
        ServeError: if there is no answer, in one line.
    """
    path = "chat/completions" if chat else "completions"
    said: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    body = {"model": model, "max_tokens": TOKENS, "temperature": 0, "stream": True, **said}
    try:
        async with (
            httpx.AsyncClient(timeout=120, trust_env=False) as client,
            client.stream("POST", f"{endpoint.url}/v1/{path}", json=body, headers=endpoint.headers) as answer,
        ):
            if answer.status_code != 200:
                raise ServeError(_reason(await answer.aread()))
            headers = answer.headers
            yield Piece(
                expert=headers.get("x-composer-expert", model), instead_of=headers.get("x-composer-instead-of", "")
            )
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    yield Piece(text=_text(orjson.loads(line[len("data: ") :])))
    except httpx.HTTPError as error:
        raise ServeError(f"{endpoint.url} does not answer: {type(error).__name__}") from None


def _text(event: dict[str, Any]) -> str:
    if "error" in event:
        raise ServeError(str(event["error"].get("message", "the answer broke off")))
    choice = (event.get("choices") or [{}])[0]
    return str((choice.get("delta") or {}).get("content") or choice.get("text") or "")


def _reason(body: bytes) -> str:
    try:
        return str(orjson.loads(body)["error"]["message"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return "the endpoint gave no reason"
