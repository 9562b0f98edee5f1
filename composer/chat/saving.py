"""A draft as a recipe file: commented, and enough to run alone."""

import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from composer.artefacts import write_text
from composer.chat.draft import Draft
from composer.chat.words import clean
from composer.errors import RecipeError

ABOUT = {
    "zoo": "the checkpoints to compose",
    "probes": "texts that models are compared on",
    "cluster": "which models may be merged with each other",
    "merge": "how a cluster becomes one model",
    "mixture": "how what cannot be merged is combined",
    "serve": "the endpoint",
    "evaluate": "the tasks that judge it",
}
"""A comment for each section."""


def as_yaml(draft: Draft, file: str = "recipe.yaml") -> str:
    """Return a draft as the text of a recipe file, with comments."""
    recipe = draft.recipe
    document = _commented(recipe.model_dump(mode="json", exclude_defaults=True))
    lines = [f"{recipe.name}: drafted in a conversation.", ""]
    lines += [f'  "{clean(said)}"' for said in draft.said]
    lines += ["", f"  model-composer run {file}"]
    limits = {key: value for key, value in draft.limits.model_dump().items() if value is not None}
    if limits:
        told = ", ".join(f"{key} {value:g}" for key, value in limits.items())
        lines += ["", f"Limits the plan was checked against, which a recipe does not hold: {told}"]
    document.yaml_set_start_comment("\n".join(lines))
    for key, about in ABOUT.items():
        if key in document:
            document.yaml_set_comment_before_after_key(key, before=about)
    out = io.StringIO()
    yaml = YAML(typ="rt")
    yaml.width = 120
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.dump(document, out)
    return out.getvalue()


def _commented(value: Any) -> Any:
    if isinstance(value, dict):
        return CommentedMap((key, _commented(one)) for key, one in value.items())
    if isinstance(value, list):
        return CommentedSeq(map(_commented, value))
    return value


def save(draft: Draft, file: str | None, home: Path) -> Path:
    """Write a draft as a recipe file and return its path.

    Args:
        draft: A draft that is a recipe.
        file: A plain file name; by default the recipe's name.
        home: The directory it is written to.

    Raises:
        RecipeError: if the name is more than a file's name, or the file exists.
    """
    name = file or f"{draft.recipe.name}.yaml"
    if Path(name).name != name or name.startswith("."):
        raise RecipeError(f"'{name}': recipes are saved beside you under a plain file name, e.g. 'save as mine.yaml'")
    path = home / (name if name.endswith((".yaml", ".yml")) else f"{name}.yaml")
    if path.exists():
        raise RecipeError(f"{path} exists and is not overwritten; save under another name")
    return write_text(path, as_yaml(draft, path.name))
