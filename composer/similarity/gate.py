"""What must agree before weights may be averaged at all."""

from composer.zoo import Checkpoint


def difference(first: Checkpoint, second: Checkpoint) -> str | None:
    """Return in words the first property that keeps two models from being merged, or None."""
    if first.architecture != second.architecture:
        return f"another architecture ({first.architecture}, {second.architecture})"
    if first.shapes_hash != second.shapes_hash:
        for what, a, b in (
            ("hidden size", first.hidden_size, second.hidden_size),
            ("number of layers", first.layers, second.layers),
            ("vocabulary size", first.vocabulary_size, second.vocabulary_size),
        ):
            if a != b:
                return f"another {what} ({a}, {b})"
        return f"other tensor names or shapes ({first.parameters:,} and {second.parameters:,} parameters)"
    if first.tokenizer.vocabulary != second.tokenizer.vocabulary:
        return "another tokenizer vocabulary"
    if first.tokenizer.merges != second.tokenizer.merges:
        return "other tokenizer merges"
    for key in sorted({*first.settings, *second.settings}):
        if first.settings.get(key) != second.settings.get(key):
            return f"another {key} ({first.settings.get(key)}, {second.settings.get(key)})"
    return None
