"""The model driver: any OpenAI-compatible endpoint with tool calls. What it says is checked; it decides nothing."""

import json
from typing import Any

import httpx
from pydantic import ValidationError

from composer.chat.answers import draft_in_words
from composer.chat.builtin import BuiltIn
from composer.chat.calls import CALL, TOOLS, DraftRecipe, PlanDraft, Question, Understood, described
from composer.chat.draft import Draft, changed
from composer.chat.shelf import Shelf
from composer.chat.words import clean
from composer.errors import ComposerError, first_line
from composer.merging.operators import OPERATORS
from composer.merging.strategies import STRATEGIES

REPAIRS = 2
"""How often an invalid draft is sent back with what is wrong with it."""
CALLS_AT_MOST = 6
TEXT_AT_MOST = 2000

SYSTEM = """\
You turn requests about composing language models into tool calls; the tools do the work and answer the person.
Call tools only; use ids exactly as listed. If something is missing or could be several things, ask one short question
in plain text instead. A run is only ever made after the person has agreed to its plan, which the program asks for.
Models: {models}
Tasks: {tasks} (lm-eval's own names may be used too)
Strategies: {strategies}
Operators: {operators}
The draft so far: {draft}"""


class _GarbledError(Exception):
    """The endpoint is down, or answers what cannot be read."""


class ModelDriver:
    """Lets a model choose the tools; falls back to the built-in driver where it is down or answers garbage.

    The model sees ids, names and the draft. It is shown no model card, file or task data, so nothing in those can
    speak to it; and whatever it calls, a plan waits for the person's yes.
    """

    def __init__(self, url: str, model: str, key: str = "", *, constrained: bool = False, timeout: float = 60) -> None:
        """Take where the model is.

        Args:
            url: Base address of the API, with "/v1".
            model: What the endpoint calls it.
            key: Its API key, if it wants one.
            constrained: Whether to constrain the answer to the tools' JSON schema, rather than to offer tools.
            timeout: Seconds to wait for an answer.
        """
        self.url, self.model, self.key = url.rstrip("/"), model, key
        self.constrained, self.timeout = constrained, timeout

    def understand(self, said: str, draft: Draft, shelf: Shelf, question: Question | None = None) -> Understood:
        """Return what the model makes of a message, or the built-in driver where there is none.

        Raises:
            RecipeError: if the message is too long.
        """
        said = clean(said)
        messages = [{"role": "system", "content": self._system(draft, shelf)}]
        if question is not None:
            messages += [{"role": "user", "content": question.said}, {"role": "assistant", "content": question.text}]
        messages.append({"role": "user", "content": said})
        try:
            return self._converse(messages, draft, shelf, said)
        except _GarbledError as error:
            built_in = BuiltIn().understand(said, draft, shelf, question)
            note = f"the model at {self.url} {error}; the built-in driver answers"
            return built_in.model_copy(update={"notes": (note, *built_in.notes)})

    def _system(self, draft: Draft, shelf: Shelf) -> str:
        return SYSTEM.format(
            models=", ".join(shelf.models),
            tasks=", ".join(shelf.tasks) or "none yet",
            strategies=", ".join(STRATEGIES.names()),
            operators=", ".join(OPERATORS.names()),
            draft=draft_in_words(draft),
        )

    def _converse(self, messages: list[dict[str, Any]], draft: Draft, shelf: Shelf, said: str) -> Understood:
        wrong = ""
        for _ in range(1 + REPAIRS):
            answer = self._ask(messages)
            try:
                called, text = self._read(answer)
                for call in called:
                    if isinstance(call, (DraftRecipe, PlanDraft)):
                        changed(draft, call.edit, shelf)
            except (ValidationError, ValueError, ComposerError) as error:
                wrong = _wrong(error)
                messages = [*messages, *_returned(answer, wrong)]
                continue
            if called:
                return Understood(calls=tuple(called))
            asks = Question(text=text, said=said) if text else None
            if asks is None:
                raise _GarbledError("answered nothing")
            return Understood(question=asks)
        raise _GarbledError(f"drafted nothing valid in {1 + REPAIRS} attempts (last: {wrong})")

    def _ask(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the message that the endpoint answers.

        Raises:
            _GarbledError: if there is none.
        """
        body: dict[str, Any] = {"model": self.model, "messages": messages, "temperature": 0}
        if self.constrained:
            schema = {"type": "array", "items": CALL.json_schema(), "maxItems": CALLS_AT_MOST}
            wrapped = {"type": "object", "properties": {"calls": schema}, "required": ["calls"]}
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "calls", "schema": _lifted(wrapped)},
            }
        else:
            body |= {"tools": described(), "tool_choice": "auto"}
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            response = httpx.post(f"{self.url}/chat/completions", json=body, headers=headers, timeout=self.timeout)
            response.raise_for_status()
            message = response.json()["choices"][0]["message"]
        except httpx.HTTPStatusError as error:
            raise _GarbledError(f"answers {error.response.status_code}") from error
        except httpx.HTTPError as error:
            raise _GarbledError(f"cannot be reached ({first_line(error)})") from error
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise _GarbledError("answers what is no chat completion") from error
        if not isinstance(message, dict):
            raise _GarbledError("answers what is no chat completion")
        return message

    def _read(self, answer: dict[str, Any]) -> tuple[list[Any], str]:
        """Return the calls in an answer, or its text.

        Raises:
            ValueError: if a call is none of the tools, or its arguments do not fit.
        """
        if self.constrained:
            listed = json.loads(answer.get("content") or "")
            return [CALL.validate_python(one) for one in listed["calls"][:CALLS_AT_MOST]], ""
        called = []
        for one in (answer.get("tool_calls") or [])[:CALLS_AT_MOST]:
            function = one.get("function") or {}
            name, arguments = function.get("name"), function.get("arguments") or "{}"
            if name not in TOOLS:
                raise ValueError(f"there is no tool '{name}'; there are: {', '.join(TOOLS)}")
            given = json.loads(arguments) if isinstance(arguments, str) else arguments
            if not isinstance(given, dict):
                raise ValueError(f"arguments of '{name}' are an object")
            called.append(CALL.validate_python({**given, "tool": name}))
        text = answer.get("content")
        return called, clean(text[:TEXT_AT_MOST]) if isinstance(text, str) else ""


def _lifted(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema with its definitions at the top, where references look for them."""
    definitions = schema["properties"]["calls"]["items"].pop("$defs", {})
    return {**schema, "$defs": definitions}


def _wrong(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:4])
    return first_line(error)


def _returned(answer: dict[str, Any], wrong: str) -> list[dict[str, Any]]:
    """Return what the model is told of an answer that did not hold."""
    called = answer.get("tool_calls") or []
    said = {"role": "assistant", "content": answer.get("content") or "", **({"tool_calls": called} if called else {})}
    if not called:
        return [said, {"role": "user", "content": f"That does not work: {wrong}. Try again."}]
    return [
        said,
        *({"role": "tool", "tool_call_id": one.get("id", ""), "content": f"error: {wrong}"} for one in called),
    ]
