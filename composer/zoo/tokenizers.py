"""Tokenizers, from their files alone."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from composer.artefacts import digest
from composer.errors import ZooError
from composer.zoo.checkpoint import TokenizerFingerprint

TEMPLATE = "chat_template.jinja"

SHARED_VOCABULARY = 0.9
"""Two vocabularies differ only by added tokens if the tokens of both stand in the same places, and these are at least
this share of the smaller one."""


def fingerprint(directory: Path) -> TokenizerFingerprint:
    """Hash the parts of a checkpoint's tokenizer, each apart; the same files are parsed once a process.

    Raises:
        ZooError: if there is no readable ``tokenizer.json``.
    """
    contents = [_content(directory / name) for name in ("tokenizer.json", "tokenizer_config.json", TEMPLATE)]
    key = tuple(contents)
    if key not in _fingerprints:
        _fingerprints[key] = _fingerprint(directory)
    return _fingerprints[key]


_fingerprints: dict[tuple[str | None, ...], TokenizerFingerprint] = {}


def _content(file: Path) -> str | None:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _fingerprint(directory: Path) -> TokenizerFingerprint:
    tokenizer = _read(directory / "tokenizer.json", required=True)
    config = _read(directory / "tokenizer_config.json", required=False)
    own, added = _own(tokenizer), _added(tokenizer)
    merges = tokenizer.get("model", {}).get("merges", [])
    special = {key: config.get(key) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    template_file = directory / TEMPLATE
    template = template_file.read_text() if template_file.is_file() else config.get("chat_template")
    return TokenizerFingerprint(
        vocabulary=digest(own),
        # Written as "a b" by some versions of the library and as ["a", "b"] by others.
        merges=digest([one.split(" ") if isinstance(one, str) else one for one in merges]),
        added_tokens=digest(sorted(added.items())),
        special_tokens=digest(special),
        chat_template=digest(template) if template else None,
        size=len(own | added),
    )


def vocabulary(directory: Path) -> dict[str, int]:
    """Return all tokens of a checkpoint's tokenizer with their ids, added ones included.

    Raises:
        ZooError: if there is no readable ``tokenizer.json``.
    """
    tokenizer = _read(directory / "tokenizer.json", required=True)
    return _own(tokenizer) | _added(tokenizer)


@lru_cache(maxsize=1024)
def added_tokens(first: str, second: str) -> tuple[str, ...] | None:
    """Return the tokens that only one of two tokenizers has, or None if they differ by more than added tokens.

    Args:
        first: The directory of one.
        second: The directory of the other.
    """
    a, b = _tokens(first), _tokens(second)
    if any(b.get(token, place) != place for token, place in a.items()):
        return None  # a token of both stands in another place
    if len(a.keys() & b.keys()) < SHARED_VOCABULARY * min(len(a), len(b)):
        return None
    only = {token: place for token, place in (a | b).items() if (token in a) != (token in b)}
    return tuple(sorted(only, key=lambda token: (only[token], token)))


@lru_cache(maxsize=64)
def shared_ids(first: str, second: str) -> tuple[int, ...] | None:
    """Return the ids that stand for the same token in two tokenizers, ascending; None as `added_tokens`."""
    if added_tokens(first, second) is None:
        return None
    a, b = _tokens(first), _tokens(second)
    return tuple(sorted(place for token, place in a.items() if token in b))


@lru_cache(maxsize=16)
def _tokens(directory: str) -> dict[str, int]:
    return vocabulary(Path(directory))


def _own(tokenizer: dict[str, Any]) -> dict[str, int]:
    """Return a tokenizer's own tokens; in unigram models the id is the place in the list."""
    tokens = tokenizer.get("model", {}).get("vocab", {})
    if isinstance(tokens, dict):
        return tokens
    return {piece[0]: place for place, piece in enumerate(tokens)}


def _added(tokenizer: dict[str, Any]) -> dict[str, int]:
    return {token["content"]: token["id"] for token in tokenizer.get("added_tokens", []) if "content" in token}


def _read(file: Path, *, required: bool) -> dict[str, Any]:
    if not file.is_file():
        if required:
            raise ZooError(f"{file.parent}: no tokenizer.json; save the tokenizer in the fast format (save_pretrained)")
        return {}
    try:
        content = json.loads(file.read_text())
    except ValueError:
        raise ZooError(f"{file}: not valid JSON; copy it again") from None
    if not isinstance(content, dict):
        raise ZooError(f"{file}: a JSON object is expected; copy it again")
    return content
