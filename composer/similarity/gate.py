"""What must agree before weights may be averaged at all."""

from pathlib import Path

from composer.zoo import Description, open_weights
from composer.zoo.kinds import is_vocabulary, layer_of
from composer.zoo.tokenizers import added_tokens


def difference(first: Description, second: Description, *, layers_only: bool = False) -> str | None:
    """Return in words the first property that keeps two models from being merged, or None.

    Args:
        first: A model.
        second: Another.
        layers_only: Whether only their layers are to be put together, whatever embedding and head are like.
    """
    for one in (first, second):
        if one.quantisation:
            return f"{one.id} is stored quantised ({one.quantisation})"
    if first.architecture != second.architecture:
        return f"another architecture ({_both(first.architecture, second.architecture)})"
    if first.shapes_hash != second.shapes_hash:
        found = _shape_difference(first, second, layers_only)
        if found or not layers_only:
            return found or "other tensor names or shapes"
    for key in sorted({*first.settings, *second.settings}):
        if first.settings.get(key) != second.settings.get(key):
            return f"another {key} ({_both(first.settings.get(key), second.settings.get(key))})"
    if first.tokenizer.merges != second.tokenizer.merges and not _from_gguf(first, second):
        return "other tokenizer merges"
    if not _same_tokens(first, second) and added_tokens(first.tokenizer_home, second.tokenizer_home) is None:
        return "another tokenizer vocabulary"
    return None


def note(first: Description, second: Description) -> str | None:
    """Return what is to be known about two models that may be merged, or None.

    Different chat templates and special tokens do not stand against a merge, but change what the result answers to.
    """
    notes = []
    if not _same_tokens(first, second):
        added = added_tokens(first.tokenizer_home, second.tokenizer_home)
        if added:
            notes.append(f"vocabularies differ by added tokens ({_few(added)})")
    elif first.vocabulary_size != second.vocabulary_size:
        notes.append(f"embeddings of {first.vocabulary_size:,} and {second.vocabulary_size:,} rows for the same tokens")
    if first.tokenizer.merges != second.tokenizer.merges:
        notes.append("tokenizer merges rebuilt from a GGUF file differ from the original's")
    if first.tokenizer.chat_template != second.tokenizer.chat_template:
        notes.append("another chat template")
    return "; ".join(notes) or None


def comparable(first: Description, second: Description) -> bool:
    """Return whether the weights of two models can be compared, whether or not they may be merged."""
    return first.shapes_hash == second.shapes_hash and not first.quantisation and not second.quantisation


def _shape_difference(first: Description, second: Description, layers_only: bool) -> str | None:
    for what, a, b in (
        ("hidden size", first.hidden_size, second.hidden_size),
        ("number of layers", first.layers, second.layers),
        ("MLP size", first.intermediate_size, second.intermediate_size),
        ("number of attention heads", first.heads, second.heads),
        ("number of key-value heads", first.kv_heads, second.kv_heads),
    ):
        if a != b:
            return f"another {what} ({_both(a, b)})"
    if first.tied_head != second.tied_head and not layers_only:
        tied, untied = (first, second) if first.tied_head else (second, first)
        return f"{tied.id} ties its output head to the embedding, {untied.id} does not"
    return _tensor_difference(first, second, layers_only)


def _tensor_difference(first: Description, second: Description, layers_only: bool) -> str | None:
    """Return the first tensor that only one model has, or that has another shape in each."""
    a, b = (open_weights(one.source, Path(one.home)).headers for one in (first, second))
    for name in sorted(a.keys() | b.keys()):
        if layers_only and layer_of(name) is None:
            continue
        if name not in a or name not in b:
            owner, other = (first, second) if name in a else (second, first)
            return f"tensor {name} is in {owner.id} and not in {other.id}"
        if a[name].shape != b[name].shape and not is_vocabulary(name):
            return f"tensor {name} has other shapes ({_both(list(a[name].shape), list(b[name].shape))})"
    return None


def _from_gguf(first: Description, second: Description) -> bool:
    """Return whether a tokenizer was rebuilt from a GGUF file, which may hold scores where merges were."""
    return "gguf" in (first.source.kind, second.source.kind)


def _same_tokens(first: Description, second: Description) -> bool:
    a, b = first.tokenizer, second.tokenizer
    return (a.vocabulary, a.added_tokens) == (b.vocabulary, b.added_tokens)


def _both(first: object, second: object) -> str:
    """Name two values in an order of their own, so that a pair reads the same from both sides."""
    return ", ".join(sorted((str(first), str(second)), key=lambda text: (len(text), text)))


def _few(tokens: tuple[str, ...]) -> str:
    return ", ".join(tokens[:4]) + (f" and {len(tokens) - 4} more" if len(tokens) > 4 else "")
