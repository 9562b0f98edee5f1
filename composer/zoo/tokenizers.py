"""Fingerprints of tokenizers, from their files alone."""

import json
from pathlib import Path
from typing import Any

from composer.artefacts import digest
from composer.errors import ZooError
from composer.zoo.checkpoint import TokenizerFingerprint


def fingerprint(directory: Path) -> TokenizerFingerprint:
    """Hash the vocabulary, merges, special tokens and chat template of a checkpoint's tokenizer, each apart.

    Raises:
        ZooError: if there is no readable ``tokenizer.json``.
    """
    tokenizer = _read(directory / "tokenizer.json", required=True)
    config = _read(directory / "tokenizer_config.json", required=False)
    model = tokenizer.get("model", {})
    added = [(token.get("id"), token.get("content")) for token in tokenizer.get("added_tokens", [])]
    vocabulary = model.get("vocab", {})
    special = {key: config.get(key) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    template_file = directory / "chat_template.jinja"
    template = template_file.read_text() if template_file.is_file() else config.get("chat_template")
    names = set(vocabulary) if isinstance(vocabulary, dict) else {piece[0] for piece in vocabulary}
    return TokenizerFingerprint(
        vocabulary=digest(vocabulary),
        merges=digest(model.get("merges", [])),
        special_tokens=digest([added, special]),
        chat_template=digest(template) if template else None,
        size=len(names | {content for _, content in added}),
    )


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
