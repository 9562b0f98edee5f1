"""Keeping a merge: the blocks that went into the live model, written as a checkpoint that says where it comes from."""

import json
from pathlib import Path
from typing import Any

from composer.artefacts import Store
from composer.merging.engine.merge import Merge
from composer.merging.engine.stock import FILE, stock_yaml
from composer.zoo import TOKENIZER_FILES, Checkpoint, Lineage, inspect_checkpoint, remember_hash
from composer.zoo.writing import WeightsWriter, copy_files, write_description

LINEAGE = "lineage.json"
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def export(merge: Merge, name: str, store: Store) -> Checkpoint:
    """Write a merge, or return the same one written before.

    Beside weights, configuration and tokenizer there are `lineage.json`, a model card, and `mergekit.yaml` where
    the stock tool can make the merge.

    Args:
        merge: What is to be kept.
        name: The checkpoint's id.
        store: Keeps it under the hash of all that determines it.

    Raises:
        MergeError: if the operator fails.
        DiskFullError: if there is no room; nothing is left behind.
    """
    path = store.path("merged", merge.key)
    if not path.exists():
        with store.new_directory("merged", merge.key) as directory:
            with merge.watching_rounding():
                hashes = write_model(merge, directory)
            merge.lineage.save(directory / LINEAGE)
            stock = stock_yaml(merge, name)
            if stock is not None:
                (directory / FILE).write_text(stock)
            (directory / "README.md").write_text(card(merge.lineage, name, stock))
        for file, value in hashes.items():
            remember_hash(path / file, value, store)
    remote = any(one.remote_code for one in merge.inputs)
    # Written under other names before, perhaps; what came out is the same.
    lineage = merge.lineage.model_copy(update={"rounding": Lineage.load(path / LINEAGE).rounding})
    return inspect_checkpoint(name, path, store, trust_remote_code=remote).renamed(name, lineage)


def write_model(merge: Merge, directory: Path, *, lasting: bool = True) -> dict[str, str]:
    """Write weights, configuration and tokenizer of a merge's result; return the sha256 of each weight file.

    What is not `lasting` is neither hashed nor brought to the disk.
    """
    headers = {name: slot.header for name, slot in merge.slots.items()}
    with WeightsWriter(directory, headers, lasting=lasting) as writer:
        for name, _, block in merge.blocks():
            writer.write(name, block)
    write_model_description(merge, directory)
    return writer.hashes


def write_model_description(merge: Merge, directory: Path) -> None:
    """Write configuration and tokenizer of a merge's result."""
    write_description(Path(merge.donor.home), directory, _changes(merge))
    if merge.vocabulary is not None:
        merge.vocabulary.tokenizer.save_pretrained(directory)
        return
    # A tokenizer rebuilt from a GGUF file may be poorer than the one it was made from.
    originals = [one for one in (merge.donor, *merge.inputs) if one.source.kind != "gguf"]
    home = Path((originals or [merge.donor])[0].tokenizer_home)
    copy_files((home / file for file in TOKENIZER_FILES), directory)


def _changes(merge: Merge) -> dict[str, Any]:
    """Return what is otherwise in the configuration than in the donor's."""
    config = json.loads((Path(merge.donor.home) / "config.json").read_text())
    changes: dict[str, Any] = {"dtype": merge.dtype}
    if merge.vocabulary is not None:
        changes["vocab_size"] = merge.vocabulary.size
    if merge.layers != merge.donor.layers:
        changes |= {key: merge.layers for key in _LAYERS if key in config}
        for key, value in config.items():
            if isinstance(value, list) and len(value) == merge.donor.layers:  # one entry per layer
                changes[key] = [value[layer] for start, stop in merge.layer_ranges() for layer in range(start, stop)]
    return changes


def card(lineage: Lineage, name: str, stock: str | None) -> str:
    """Return a merged checkpoint's model card in Markdown."""
    licences = sorted({licence or "not stated" for licence in lineage.licences.values()})
    lines = [
        "---",
        "library_name: transformers",
        "tags: [merge, model-composer]",
        "---",
        "",
        f"# {name}",
        "",
        f"Merged by `{lineage.operator}` from {len(lineage.inputs)} models, without training.",
        "",
        "| input | licence | sha256 of the checkpoint |",
        "|---|---|---|",
    ]
    for one, content_hash in zip(lineage.inputs, lineage.input_hashes, strict=True):
        lines.append(f"| {one} | {lineage.licences.get(one) or 'not stated'} | `{content_hash}` |")
    if lineage.base:
        base = next((one for one in lineage.licences if one not in lineage.inputs), "the base")
        lines.append(f"| {base} (base) | {lineage.licences.get(base) or 'not stated'} | `{lineage.base}` |")
    lines += ["", "| parameter | value |", "|---|---|"]
    lines += [f"| {key} | {json.dumps(value)} |" for key, value in lineage.parameters.items()]
    if lineage.seed is not None:
        lines.append(f"| seed | {lineage.seed} |")
    lines += ["", f"Licences of the sources, which apply to the merge: {', '.join(licences)}."]
    if lineage.dequantised:
        named = ", ".join(f"{one} (from {kind})" for one, kind in sorted(lineage.dequantised.items()))
        lines += ["", f"Made from models that had been quantised, and lost precision then: {named}."]
    if lineage.rounding:
        lines += ["", f"Rounding to the storage type changed {lineage.rounding:.1%} as much as the merge did."]
    if stock is not None:
        lines += ["", "The same merge with the stock tool:", "", "```yaml", stock.rstrip(), "```"]
    else:
        lines += ["", "mergekit has no such operator; the merge is made anew by a recipe with these parameters."]
    return "\n".join(lines) + "\n"
