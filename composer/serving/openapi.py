"""What `/openapi.json` says of requests and answers.

Only what the gateway itself reads is described; everything else of OpenAI's API is passed on to the engine as it is.
"""

from typing import Any

Schema = dict[str, Any]


def _object(properties: Schema, required: list[str]) -> Schema:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": True}


_TEXT: Schema = {"type": "string"}
_TEXTS: Schema = {"oneOf": [_TEXT, {"type": "array", "items": _TEXT, "minItems": 1}]}
_MODEL: Schema = {"type": "string", "description": "the composite, or an expert by its id"}
_COUNT: Schema = {"type": "integer", "minimum": 1, "description": "answers to each prompt"}
_MESSAGE = _object({"role": _TEXT, "content": {}}, ["role"])
_ASKING = _object({"role": {"const": "user"}, "content": _TEXT}, ["role", "content"])
_MESSAGES: Schema = {"type": "array", "items": _MESSAGE, "minItems": 1, "contains": _ASKING}
_COMMON: Schema = {"model": _MODEL, "n": _COUNT, "stream": {"type": "boolean"}, "max_tokens": {"type": "integer"}}

_BODIES: dict[str, Schema] = {
    "chat": _object({**_COMMON, "messages": _MESSAGES}, ["messages"]),
    "completion": _object({**_COMMON, "prompt": _TEXTS}, ["prompt"]),
    "route": {"anyOf": [_object({"input": _TEXTS}, ["input"]), _object({"messages": _MESSAGES}, ["messages"])]},
}

_ERROR = _object(
    {
        "error": _object(
            {"message": _TEXT, "type": _TEXT, "param": {"type": ["string", "null"]}, "code": {}}, ["message", "type"]
        )
    },
    ["error"],
)
_CARD = _object({"id": _TEXT, "object": {"const": "model"}, "owned_by": _TEXT}, ["id", "object"])
_NUMBERS: Schema = {"type": "object", "additionalProperties": {"type": "number"}}
_DECISION = _object(
    {
        "expert": _TEXT,
        "scores": _NUMBERS,
        "confidence": {"type": "number"},
        "margin": {"type": "number"},
        "reason": _TEXT,
        "abstained": {"type": "boolean"},
    },
    ["expert", "scores", "confidence", "margin", "reason"],
)
_STATES = _object({"status": {"enum": ["ok", "degraded"]}, "engines": {"type": "object"}}, ["status", "engines"])


def _json(schema: Schema, words: str) -> Schema:
    return {"description": words, "content": {"application/json": {"schema": schema}}}


def _errors(*codes: int) -> dict[int | str, Schema]:
    words = {
        400: "the request cannot be answered", 401: "an API key is needed", 403: "not a name of this machine",
        404: "no such model", 405: "not with this method", 408: "the request took too long to arrive",
        413: "the body is too large", 422: "the engine cannot read the request",
        429: "too many requests at once", 500: "an error of the gateway's own",
        501: "the engine cannot do this", 502: "the engine failed", 503: "the engine is down",
        504: "the answer took too long",
    }  # fmt: skip
    return {code: _json(_ERROR, words[code]) for code in codes}


def body(name: str) -> Schema:
    """Return the description of a request's body: "chat", "completion" or "route"."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _BODIES[name]}}}}


_ASKED = _errors(400, 401, 403, 404, 408, 413, 429, 500)
HEALTH: dict[int | str, Schema] = {
    200: _json(_STATES, "every engine answers"),
    503: _json(_STATES, "some do not"),
    **_errors(403, 500),
}
METRICS: dict[int | str, Schema] = {
    200: {"description": "Prometheus' text format", "content": {"text/plain": {"schema": _TEXT}}},
    **_errors(401, 403, 429, 500),
}
MODELS: dict[int | str, Schema] = {
    200: _json(_object({"object": _TEXT, "data": {"type": "array", "items": _CARD}}, ["data"]), "all names"),
    **_errors(401, 403, 429, 500),
}
MODEL: dict[int | str, Schema] = {200: _json(_CARD, "one name"), **_errors(401, 403, 404, 429, 500)}
ROUTE: dict[int | str, Schema] = {
    200: _json(_object({"data": {"type": "array", "items": _DECISION}}, ["data"]), "one decision for each text"),
    **_ASKED,
}
ANSWER: dict[int | str, Schema] = {
    200: {
        "description": "the expert's answer, as OpenAI's API has it; a stream of events if `stream` is set",
        "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {"schema": _TEXT}},
        "headers": {
            "x-composer-expert": {"schema": _TEXT, "description": "who answered"},
            "x-composer-margin": {"schema": _TEXT, "description": "difference between the best two scores"},
            "x-composer-instead-of": {"schema": _TEXT, "description": "who should have, and is down"},
        },
    },
    **_ASKED,
    **_errors(422, 501, 502, 503, 504),
}
