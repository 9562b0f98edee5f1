"""A draft that was edited as YAML.

Door: `rewritten`.
"""

from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent

from composer.chat.draft import Draft, changed
from composer.chat.edit import Edit
from composer.chat.shelf import Shelf
from composer.errors import RecipeError
from composer.recipe import read_recipe

FILE = "draft.yaml"
"""What errors call the text."""
KEPT = (
    "zoo.base",
    "zoo.trust_remote_code",
    "probes.texts",
    "merge.simmerge.predictor",
    "mixture.router.labelled",
    "mixture.router.encoder",
    "serve.host",
    "serve.require_key",
    "serve.keys",
    "serve.remote",
    "evaluate.include",
    "evaluate.sandbox",
)
"""What a conversation does not change: files that are read, code that is run, and who may ask the endpoint."""


def rewritten(draft: Draft, text: str, shelf: Shelf) -> Draft:
    """Return the draft that a recipe's text stands for.

    Args:
        draft: What there was before; its limits hold on.
        text: YAML.
        shelf: What may be named.

    Raises:
        RecipeError: if it is no recipe, reaches beyond the shelf, or cannot be met; one line for each thing wrong.
    """
    folder = shelf.path.parent
    try:
        recipe = read_recipe(_without_aliases(text), folder / FILE)
    except RecipeError as error:
        raise RecipeError(str(error).replace(f"{folder / FILE}:", "line ")) from None
    document = recipe.model_dump(mode="json", exclude_defaults=True)
    _check_shelf(document, shelf)
    document["zoo"]["models"].sort(key=lambda entry: shelf.models.index(entry["id"]))
    by_hand = draft.model_copy(update={"document": document})
    return changed(by_hand, Edit(tasks=tuple(recipe.evaluate.tasks)), shelf, "(edited as YAML)")


def _without_aliases(text: str) -> str:
    """Return the text; refuse aliases, a few of which can stand for gigabytes."""
    try:
        aliased = any(isinstance(event, AliasEvent) for event in YAML(typ="rt").parse(text))
    except YAMLError:
        return text  # told with its line by who reads it
    if aliased:
        raise RecipeError("a recipe that is edited here may hold no YAML aliases (*name); write the value out")
    return text


def _check_shelf(document: dict[str, Any], shelf: Shelf) -> None:
    """Refuse models that are not as on the shelf, and changes of what is `KEPT`."""
    where = f"a conversation keeps what {shelf.path.name} says; change it there"
    for entry in document["zoo"]["models"]:
        shelf.check(entry["id"])
        if entry != shelf.entry(entry["id"]):
            raise RecipeError(f"zoo.models.{entry['id']}: {where}")
    for key in KEPT:
        if _value(document, key) != _value(shelf.document, key):
            raise RecipeError(f"{key}: {where}")


def _value(document: dict[str, Any], key: str) -> Any:
    node: Any = document
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node
