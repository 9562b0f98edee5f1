"""From model references to described checkpoints, reading headers and configuration only."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from composer.artefacts import Store, digest, write_text
from composer.errors import ZooError
from composer.progress import Progress, Step, silent
from composer.zoo import adapters, gguf, hub
from composer.zoo.checkpoint import Checkpoint, Description, Zoo
from composer.zoo.kinds import is_vocabulary
from composer.zoo.references import ModelReference, Source, downloads, locate
from composer.zoo.settings import ZooSection
from composer.zoo.tokenizers import fingerprint
from composer.zoo.weights import SafetensorsWeights, TensorHeader, Weights, weight_files

MERGE_SETTINGS = (
    "rms_norm_eps",
    "layer_norm_epsilon",
    "layer_norm_eps",
    "hidden_act",
    "activation_function",
    "num_attention_heads",
    "num_key_value_heads",
    "sliding_window",
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
)
"""Configuration that changes what the same weights compute, besides that of positions."""

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
        ZooError: naming the first checkpoint that cannot be used, and why; or, where broken ones are skipped, if
            none is left.
    """
    members: list[Checkpoint] = []
    skipped: dict[str, str] = {}
    options: dict[str, Any] = {"trust_remote_code": section.trust_remote_code, "progress": progress}
    for index, entry in enumerate(section.models):
        progress(Step(stage="inspect", message=entry.id, done=index, total=len(section.models)))
        try:
            members.append(inspect_checkpoint(entry.id, entry.reference, store, **options))
        except ZooError as error:
            if section.on_error == "stop":
                raise
            skipped[entry.id] = str(error).removeprefix(f"model '{entry.id}': ")
    if not members:
        raise ZooError(f"no model of the zoo can be used; the first: {next(iter(skipped.values()))}")
    stated, base_reason = (ModelReference(model=section.base), None) if section.base else _common_base(members)
    base = None
    if stated is not None:
        try:
            base = inspect_checkpoint("base", stated, store, **options)
        except ZooError as error:
            if section.on_error == "stop":
                raise
            skipped["base"] = str(error).removeprefix("model 'base': ")
    if base is not None:
        same = next((member for member in members if member.content_hash == base.content_hash), None)
        base = base.renamed(same.id) if same else base
    return Zoo(
        members=tuple(members),
        base=base,
        base_reason=base_reason,
        examples={entry.id: tuple(entry.examples) for entry in section.models},
        skipped=skipped,
    )


def missing_downloads(section: ZooSection) -> dict[str, int]:
    """Return the bytes that `inspect_zoo` would download, by hub repository.

    Raises:
        ZooError: if the hub cannot say.
    """
    references = [entry.reference for entry in section.models]
    if section.base:
        references.append(ModelReference(model=section.base))
    missing: dict[str, int] = {}
    for reference in references:
        try:
            missing |= downloads(reference)
        except ZooError:
            if section.on_error == "stop":
                raise
    return missing


def _common_base(members: list[Checkpoint]) -> tuple[ModelReference | None, str | None]:
    """Return the model that all adapters of the zoo are for, if there are any and it is the same one."""
    paths = {member.source.path for member in members if member.source.adapter}
    if len(paths) != 1:
        return None, None
    path = paths.pop()
    return ModelReference(model=path), f"it is what the adapters of the zoo are for ({path})"


def inspect_checkpoint(
    name: str,
    model: ModelReference | Path,
    store: Store,
    *,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Checkpoint:
    """Describe one checkpoint and hash its content.

    Raises:
        ZooError: as `describe`.
    """
    description = describe(name, model, store, trust_remote_code=trust_remote_code, progress=progress)
    content_hash = _content_hash(description, store, progress)
    source = description.source
    path = source.path if source.whole else str(store.path("whole", content_hash))
    return Checkpoint(**dict(description), path=path, content_hash=content_hash)


def describe(
    name: str,
    model: ModelReference | Path,
    store: Store,
    *,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Description:
    """Describe one checkpoint from headers and configuration; what is on the hub is downloaded.

    Raises:
        ZooError: if the model is missing, in an unknown format, truncated, needs remote code that is not allowed,
            or lacks a configuration or tokenizer.
    """
    with _naming(name):
        return _describe(name, model, store, trust_remote_code, progress)


def _describe(
    name: str, model: ModelReference | Path, store: Store, trust_remote_code: bool, progress: Progress
) -> Description:
    reference = ModelReference(model=str(model)) if isinstance(model, Path) else model
    source = locate(reference, code=trust_remote_code, progress=progress)
    path = Path(source.path)
    home = gguf.describe_gguf(path, store) if source.kind == "gguf" else path
    config = _config(home)
    weights = open_weights(source, home)
    files = {header.file for header in weights.headers.values()}
    return _described(name, source, home, config, weights.headers, len(files), trust_remote_code)


def describe_remote(name: str, reference: ModelReference) -> Description:
    """Describe a checkpoint on the hub from the headers of its files; its weights are not downloaded.

    Raises:
        ZooError: as `describe`.
    """
    with _naming(name):
        if reference.repository is None:
            raise ZooError(f"{reference} is not on the hub")
        repository, revision = reference.repository
        home = hub.fetch(repository, revision, weights=False)
        if not (home / "config.json").is_file():
            what = "an adapter, described with its base" if (home / adapters.CONFIG).is_file() else "no checkpoint"
            raise ZooError(f"{repository}: {what}; give BASE --adapter ADAPTER, or --file for a GGUF file in it")
        headers = hub.remote_headers(repository, revision)
        source = Source(kind="directory", path=str(home))
        files = {header.file for header in headers.values()}
        return _described(name, source, home, _config(home), headers, len(files), allow_code=False)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put a model's name before what is wrong with it."""
    try:
        yield
    except ZooError as error:
        raise ZooError(f"model '{name}': {error}") from error.__cause__


def open_weights(source: Source, home: Path) -> Weights:
    """Open the weights of a model, an adapter folded in and a GGUF file dequantised as they are read.

    Raises:
        ZooError: if they cannot be read, or the adapter is for another base.
    """
    path = Path(source.path)
    weights: Weights = gguf.GgufWeights(path, home) if source.kind == "gguf" else SafetensorsWeights(path)
    return adapters.FoldedWeights(weights, Path(source.adapter)) if source.adapter else weights


def _described(
    name: str,
    source: Source,
    home: Path,
    config: dict[str, Any],
    headers: dict[str, TensorHeader],
    files: int,
    allow_code: bool,
) -> Description:
    remote_code = _needs_remote_code(home, config, allow_code)
    storage: Counter[str] = Counter()
    for header in headers.values():
        storage[header.dtype] += header.elements
    text = config.get("text_config") or config.get("expert_config") or config
    adapter = Path(source.adapter) if source.adapter else None
    tokenizer_home = adapter if adapter is not None and (adapter / "tokenizer.json").is_file() else home
    heads = text.get("num_attention_heads") or text.get("n_head")
    return Description(
        id=name,
        source=source,
        home=str(home),
        tokenizer_home=str(tokenizer_home),
        architecture=_architecture(home, config),
        parameters=sum(storage.values()),
        dtype=storage.most_common(1)[0][0],
        size_bytes=sum(header.nbytes for header in headers.values()),
        files=files,
        context_length=text.get("max_position_embeddings") or text.get("n_positions"),
        hidden_size=text.get("hidden_size") or text.get("n_embd"),
        intermediate_size=text.get("intermediate_size") or text.get("n_inner"),
        layers=text.get("num_hidden_layers") or text.get("n_layer"),
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        vocabulary_size=text.get("vocab_size"),
        tied_head=not any(re.search(r"(lm_head|embed_out|output)\.weight$", key) for key in headers),
        tokenizer=fingerprint(tokenizer_home),
        licence=_card(adapter or home, "license") or _card(home, "license") or _licence_file(home),
        base_hint=(adapters.adapter_config(adapter).get("base_model_name_or_path") if adapter else None)
        or _card(home, "base_model"),
        shapes_hash=digest(
            {key: header.shape[1:] if is_vocabulary(key) else header.shape for key, header in headers.items()}
        ),
        quantisation=_quantisation(config),
        dequantised_from=gguf.quantisation(home) if source.kind == "gguf" else None,
        remote_code=remote_code,
        settings=_settings(text),
    )


def _config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        weight_files(path)  # a directory with nothing in it is better described by what it lacks most
        raise ZooError(f"{path} has no config.json; is it a Hugging Face checkpoint?")
    try:
        config = json.loads(file.read_text())
    except ValueError:
        raise ZooError(f"{file} is not valid JSON; copy it again") from None
    if not isinstance(config, dict):
        raise ZooError(f"{file} is not a JSON object; copy it again")
    return config


def _architecture(path: Path, config: dict[str, Any]) -> str:
    architectures = config.get("architectures") or []
    if not architectures:
        raise ZooError(f"{path / 'config.json'} names no architecture ('architectures' is empty)")
    return str(architectures[0])


def _quantisation(config: dict[str, Any]) -> str | None:
    section = config.get("quantization_config")
    return str(section.get("quant_method") or "unknown method") if isinstance(section, dict) else None


def _settings(config: dict[str, Any]) -> dict[str, str]:
    """Return what must agree, worded alike however the configuration was written.

    RoPE is in `rope_parameters` since transformers 5 and was in `rope_theta` and `rope_scaling` before; a GGUF file
    holds numbers in single precision.
    """
    found = {key: config[key] for key in MERGE_SETTINGS if config.get(key) is not None}
    if "num_attention_heads" in found:
        found.setdefault("num_key_value_heads", found["num_attention_heads"])
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta"))
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
    rope = {key: value for key, value in rope.items() if value is not None}
    if "rope_theta" in rope:
        found["rope"] = rope
    return {key: json.dumps(_rounded(value), sort_keys=True) for key, value in found.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(f"{value:.6g}")
    return value


def _needs_remote_code(path: Path, config: dict[str, Any], allowed: bool) -> bool:
    if "auto_map" not in config:
        return False
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    needed = config.get("model_type") not in CONFIG_MAPPING_NAMES
    if needed and not allowed:
        raise ZooError(
            f"{path} needs Python code of its own (auto_map in config.json); refused. "
            "If you have read that code, set zoo.trust_remote_code: true"
        )
    return needed


def _card(directory: Path, key: str) -> str | None:
    """Return a value of the front matter of a model card."""
    card = directory / "README.md"
    if not card.is_file():
        return None
    match = re.search(rf"^{key}:\s*(\S.*)$", card.read_text(errors="replace"), re.MULTILINE)
    return match[1].strip().strip("\"'") if match else None


def _licence_file(directory: Path) -> str | None:
    """Return the first line of a licence file."""
    for file in sorted([*directory.glob("LICENSE*"), *directory.glob("LICENCE*")]):
        lines = file.read_text(errors="replace").strip().splitlines()
        if lines:
            return lines[0].strip()[:80]
    return None


def _content_hash(one: Description, store: Store, progress: Progress) -> str:
    if one.source.kind == "gguf":
        files = [Path(one.source.path)]
    else:
        path = Path(one.source.path)
        files = [path / "config.json", *weight_files(path), *(path / name for name in TOKENIZER_FILES)]
        if one.remote_code:
            files += sorted(path.glob("*.py"))
    hashes = _hashes(one.id, files, store, progress)
    if one.source.adapter is None:
        return digest(hashes)
    adapter = Path(one.source.adapter)
    parts = [adapter / adapters.CONFIG, adapter / adapters.WEIGHTS, *(adapter / name for name in TOKENIZER_FILES)]
    return digest([hashes, _hashes(one.id, parts, store, progress)])


def _hashes(name: str, files: list[Path], store: Store, progress: Progress) -> dict[str, str]:
    present = [file for file in files if file.is_file()]
    total = sum(file.stat().st_size for file in present)
    done, hashes = 0, {}
    for file in present:
        if total > 1 << 30:
            progress(Step(stage="inspect", message=f"hashing {name}: {file.name}", done=done, total=total))
        hashes[file.name] = _file_hash(file, store)
        done += file.stat().st_size
    return hashes


def _file_hash(file: Path, store: Store) -> str:
    """Return a file's sha256, remembered by path, size and modification time."""
    known = _known_hash(file, store)
    if known.is_file():
        return known.read_text().strip()
    with file.open("rb") as stream:
        value = hashlib.file_digest(stream, "sha256").hexdigest()
    write_text(known, value + "\n")
    return value


def remember_hash(file: Path, value: str, store: Store) -> None:
    """Remember a file's sha256 that is known from writing it."""
    write_text(_known_hash(file, store), value + "\n")


def _known_hash(file: Path, store: Store) -> Path:
    status = file.stat()
    return store.path("hashes", digest([str(file.resolve()), status.st_size, status.st_mtime_ns]))
