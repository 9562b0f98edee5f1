"""What understands messages: the built-in driver, or a model behind an OpenAI-compatible endpoint."""

import os
from typing import Protocol

from composer.chat.builtin import BuiltIn
from composer.chat.calls import Question, Understood
from composer.chat.draft import Draft
from composer.chat.shelf import Shelf

URL_VARIABLE = "MODEL_COMPOSER_CHAT_URL"
MODEL_VARIABLE = "MODEL_COMPOSER_CHAT_MODEL"
KEY_VARIABLE = "MODEL_COMPOSER_CHAT_KEY"
"""Holds the name of the variable that holds the key, so that the key itself is in no settings."""
SCHEMA_VARIABLE = "MODEL_COMPOSER_CHAT_SCHEMA"
"""Set to 1: the answer is constrained to the JSON schema of the tools instead, for small local models."""


class Driver(Protocol):
    """Turns messages into calls."""

    def understand(self, said: str, draft: Draft, shelf: Shelf, question: Question | None = None) -> Understood:
        """Return what a message asks for."""
        ...


def make_driver() -> Driver:
    """Return the model behind the endpoint that the environment names, else the built-in driver."""
    url = os.environ.get(URL_VARIABLE)
    if not url:
        return BuiltIn()
    from composer.chat.endpoint import ModelDriver

    return ModelDriver(
        url,
        os.environ.get(MODEL_VARIABLE, "default"),
        os.environ.get(os.environ.get(KEY_VARIABLE, ""), ""),
        constrained=os.environ.get(SCHEMA_VARIABLE) == "1",
    )
