"""From model references to described checkpoints, reading headers and configuration only."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from composer.artefacts import Store, digest, write_text
from composer.errors import ZooError
from composer.progress import Progress, Step, silent
from composer.zoo.checkpoint import Checkpoint, Zoo
from composer.zoo.settings import ZooSection
from composer.zoo.tokenizers import fingerprint
from composer.zoo.weights import read_headers, weight_files

MERGE_SETTINGS = (
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "rms_norm_eps",
    "layer_norm_epsilon",
    "layer_norm_eps",
    "hidden_act",
    "activation_function",
    "num_attention_heads",
    "num_key_value_heads",
    "sliding_window",
)
"""Configuration that changes what the same weights compute."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def inspect_zoo(section: ZooSection, store: Store, progress: Progress = silent) -> Zoo:
    """Describe every checkpoint of a recipe.

    Args:
        section: The recipe's `zoo`.
        store: Remembers content hashes by path, size and modification time.
        progress: Told of each checkpoint.

    Raises:
        ZooError: naming the first checkpoint that cannot be used, and why.
    """
    members = []
    for index, entry in enumerate(section.models):
        progress(Step(stage="inspect", message=entry.id, done=index, total=len(section.models)))
        members.append(
            inspect_checkpoint(entry.id, Path(entry.model), store, trust_remote_code=section.trust_remote_code)
        )
    base = None
    if section.base is not None:
        base = inspect_checkpoint("base", Path(section.base), store, trust_remote_code=section.trust_remote_code)
        same = next((member for member in members if member.content_hash == base.content_hash), None)
        base = base.renamed(same.id if same else "base")
    return Zoo(
        members=tuple(members),
        base=base,
        examples={entry.id: tuple(entry.examples) for entry in section.models},
    )


def inspect_checkpoint(name: str, path: Path, store: Store, *, trust_remote_code: bool = False) -> Checkpoint:
    """Describe one local Hugging Face directory.

    Raises:
        ZooError: if the path is missing, has no safetensors weights, is truncated, needs remote code that is
            not allowed, or lacks a configuration or tokenizer.
    """
    if not path.exists():
        raise ZooError(f"model '{name}': {path} does not exist; give the path of a local Hugging Face directory")
    if not path.is_dir():
        raise ZooError(f"model '{name}': {path} is a file; give the directory that holds it")
    config = _config(name, path)
    headers = read_headers(path)
    remote_code = _needs_remote_code(name, path, config, trust_remote_code)
    storage: Counter[str] = Counter()
    for header in headers.values():
        storage[header.dtype] += header.elements
    text = config.get("text_config") or config
    return Checkpoint(
        id=name,
        path=str(path.resolve()),
        architecture=_architecture(name, path, config),
        parameters=sum(storage.values()),
        dtype=storage.most_common(1)[0][0],
        size_bytes=sum(file.stat().st_size for file in weight_files(path)),
        context_length=text.get("max_position_embeddings") or text.get("n_positions"),
        hidden_size=text.get("hidden_size") or text.get("n_embd"),
        layers=text.get("num_hidden_layers") or text.get("n_layer"),
        vocabulary_size=text.get("vocab_size"),
        tokenizer=fingerprint(path),
        licence=_licence(path),
        content_hash=_content_hash(path, store),
        shapes_hash=digest({key: header.shape for key, header in headers.items()}),
        remote_code=remote_code,
        settings={key: json.dumps(text[key], sort_keys=True) for key in MERGE_SETTINGS if text.get(key) is not None},
    )


def _config(name: str, path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        weight_files(path)  # a directory with nothing in it is better described by what it lacks most
        raise ZooError(f"model '{name}': {path} has no config.json; is it a Hugging Face checkpoint?")
    try:
        config = json.loads(file.read_text())
    except ValueError:
        raise ZooError(f"model '{name}': {file} is not valid JSON; copy it again") from None
    if not isinstance(config, dict):
        raise ZooError(f"model '{name}': {file} is not a JSON object; copy it again")
    return config


def _architecture(name: str, path: Path, config: dict[str, Any]) -> str:
    architectures = config.get("architectures") or []
    if not architectures:
        raise ZooError(f"model '{name}': {path / 'config.json'} names no architecture ('architectures' is empty)")
    return str(architectures[0])


def _needs_remote_code(name: str, path: Path, config: dict[str, Any], allowed: bool) -> bool:
    if "auto_map" not in config:
        return False
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    needed = config.get("model_type") not in CONFIG_MAPPING_NAMES
    if needed and not allowed:
        raise ZooError(
            f"model '{name}': {path} needs Python code of its own (auto_map in config.json); refused. "
            "If you have read that code, set zoo.trust_remote_code: true"
        )
    return needed


def _licence(path: Path) -> str | None:
    """Return the licence a model card states in its front matter, else the first line of a licence file."""
    card = path / "README.md"
    if card.is_file():
        match = re.search(r"^license:\s*(\S+)", card.read_text(errors="replace"), re.MULTILINE)
        if match:
            return match[1]
    for file in sorted(path.glob("LICEN[CS]E*")):
        lines = file.read_text(errors="replace").strip().splitlines()
        if lines:
            return lines[0].strip()[:80]
    return None


def _content_hash(path: Path, store: Store) -> str:
    files = [path / "config.json", *weight_files(path), *(path / name for name in TOKENIZER_FILES)]
    return digest({file.name: _file_hash(file, store) for file in files if file.is_file()})


def _file_hash(file: Path, store: Store) -> str:
    """Return a file's sha256, remembered by path, size and modification time."""
    real, status = file.resolve(), file.stat()
    known = store.path("hashes", digest([str(real), status.st_size, status.st_mtime_ns]))
    if known.is_file():
        return known.read_text().strip()
    with file.open("rb") as stream:
        value = hashlib.file_digest(stream, "sha256").hexdigest()
    write_text(known, value + "\n")
    return value
