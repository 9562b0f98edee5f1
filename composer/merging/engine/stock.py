"""The configuration with which the stock mergekit tool makes the same merge."""

from io import StringIO
from pathlib import Path
from typing import Any

from composer.merging.engine.merge import Merge
from composer.merging.operators import Value, group_of
from composer.zoo import Checkpoint
from composer.zoo.kinds import layer_of, layer_prefix

FILE = "mergekit.yaml"
_NOT_MERGEKITS = frozenset({"from_base", "first", "last"})


def stock_yaml(merge: Merge, name: str) -> str | None:
    """Return a merge as mergekit's YAML, with the merges that went into it before, or None if mergekit cannot make it.

    With several documents it is for ``mergekit-multi``, else for ``mergekit-yaml``.
    """
    from ruamel.yaml import YAML

    if merge.operator.method is None:
        return None
    before = [_made_before(one) for one in merge.inputs if one.lineage is not None]
    if None in before:
        return None
    config = stock_config(merge, {one.content_hash: _place(one) for one in [*merge.inputs, merge.donor]})
    text = StringIO()
    yaml = YAML()
    yaml.default_flow_style = None
    yaml.dump({"name": name, **config}, text)
    tool = "mergekit-multi FILE -I DIR --out-path DIR" if before else "mergekit-yaml FILE DIR"
    seed = f" --random-seed {merge.seed}" if merge.operator.random else ""
    documents = [*dict.fromkeys(part for one in before if one for part in one.split("---\n")), text.getvalue()]
    documents = [part for part in documents if part.strip() and not part.startswith("#")]
    return f"# {tool}{seed}\n---\n" + "---\n".join(documents)


def _made_before(checkpoint: Checkpoint) -> str | None:
    file = Path(checkpoint.path) / FILE
    return file.read_text() if file.is_file() else None


def _place(checkpoint: Checkpoint) -> str:
    """Return what mergekit is to call a checkpoint: its path, or its name if it was merged before."""
    return checkpoint.id if checkpoint.lineage is not None else checkpoint.path


def stock_config(merge: Merge, places: dict[str, str]) -> dict[str, Any]:
    """Return a merge as mergekit's configuration.

    Args:
        merge: One of an operator that mergekit has.
        places: What mergekit is to call each model, by content hash.
    """
    operator, values = merge.operator, merge.values
    config: dict[str, Any] = {"merge_method": operator.method}
    if merge.step.operator == "passthrough":
        config["slices"] = [
            {"sources": [{"model": places[one.content_hash], "layer_range": list(layers)}]}
            for one, layers in zip(merge.inputs, merge.layer_ranges(), strict=True)
        ]
    else:
        each = [key for key in values if operator.parameters[key].per_input]
        config["models"] = [
            {
                "model": places[one.content_hash],
                **({"parameters": {key: _setting(merge, _own(values[key], index)) for key in each}} if each else {}),
            }
            for index, one in enumerate(merge.inputs)
        ]
        whole = {key: _setting(merge, values[key]) for key in values if key not in (*each, *_NOT_MERGEKITS)}
        if whole:
            config["parameters"] = whole
    # Where the method would take a base for more than configuration and tokenizer, none is said that is not wanted.
    if merge.base is not None or "from_base" not in values:
        config["base_model"] = places[merge.donor.content_hash]
    config |= {"dtype": "float32", "out_dtype": merge.dtype}
    if merge.vocabulary is not None:
        config["tokenizer"] = {"source": merge.vocabulary.source}
    return config


def _own(value: Value, index: int) -> Any:
    return value[index] if isinstance(value, list) else value


def _setting(merge: Merge, value: Any) -> Any:
    """Return a value, or one for each layer by the names of its tensors where it is given by groups."""
    if not isinstance(value, list):
        return value
    layers = merge.donor.layers or 1
    prefix = next(layer_prefix(name) for name in merge.slots if layer_of(name) == 0)
    before = prefix.removesuffix("0.")
    by_layer = [
        {"filter": f"{before}{layer}.", "value": value[group_of(layer, layers, len(value))]} for layer in range(layers)
    ]
    return [*by_layer, {"value": value[-1]}]
