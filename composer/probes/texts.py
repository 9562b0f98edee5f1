"""Probe texts: short, varied, unlabelled."""

import json
from pathlib import Path

from composer.errors import RecipeError

DEFAULT = Path(__file__).with_name("texts.jsonl")
"""96 original texts, eight of each of twelve kinds, in turn, so that the first few are as varied as all."""


def load_texts(texts: str, limit: int, characters: int) -> tuple[str, ...]:
    """Return probe texts, each cut to a number of characters.

    Cut by characters, not tokens, so that models with different tokenizers see the same.

    Args:
        texts: "default", or a file: plain text, one text a line, or JSON lines with a "text" in each.
        limit: At most this many texts.
        characters: At most this many characters of each.

    Raises:
        RecipeError: if the file cannot be read or holds no text.
    """
    path = DEFAULT if texts == "default" else Path(texts)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise RecipeError(f"probes.texts: {path} cannot be read ({error.strerror}); give a text file") from None
    except UnicodeDecodeError:
        raise RecipeError(f"probes.texts: {path} is not UTF-8 text") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if path.suffix == ".jsonl" and line.strip():
            try:
                line = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                raise RecipeError(f'{path}:{number}: not a JSON object with a "text"') from None
        if str(line).strip():
            found.append(str(line)[:characters])
    if not found:
        raise RecipeError(f"probes.texts: {path} holds no text")
    return tuple(found[:limit])
