"""Recipes: the one file that says everything about a composition.

A recipe is YAML, read into strict models: an unknown key, a wrong type or a name that does not exist is an
error that gives the file, the line, what was read and the nearest right name.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from composer.clustering import ClusterSection
from composer.errors import RecipeError, first_line
from composer.evaluation.settings import EvaluateSection
from composer.merging.settings import MergeSection
from composer.mixture.settings import MixtureSection
from composer.probes import ProbesSection
from composer.registry import nearest
from composer.serving.settings import ServeSection
from composer.settings import Identifier, Section
from composer.zoo.references import absolute
from composer.zoo.settings import ZooSection

S = TypeVar("S", bound=Section)


class Recipe(Section):
    """A whole composition: from a zoo to a served, measured composite."""

    name: Identifier
    """Names the run."""
    zoo: ZooSection
    probes: ProbesSection = ProbesSection()
    cluster: ClusterSection = ClusterSection()
    merge: MergeSection = MergeSection()
    mixture: MixtureSection = MixtureSection()
    serve: ServeSection = ServeSection()
    evaluate: EvaluateSection
    executor: Literal["local", "ray"] = "local"
    """Where merges are tried and models scored: in this process, or fanned out over a Ray cluster (the one that
    RAY_ADDRESS names, else one on this machine). All nodes must see the models and the runs directory."""
    workers: Annotated[int, Field(ge=1)] | None = None
    """For `ray`: how many models are in work at a time; by default one for each GPU, else for every two cores."""

    @model_validator(mode="after")
    def _names_are_distinct(self) -> Self:
        if self.name in [entry.id for entry in self.zoo.models]:
            raise ValueError(
                f"the composite's name, '{self.name}', is also a model's id; both are names on the endpoint"
            )
        return self

    @model_validator(mode="after")
    def _what_is_named_is_there(self) -> Self:
        ids = [entry.id for entry in self.zoo.models]
        for name in self.cluster.apart:
            if name not in ids:
                raise ValueError(f"cluster.apart names '{name}', which is no model{nearest(name, ids)}")
        for task in self.merge.protect:
            if task not in self.evaluate.tasks:
                hint = nearest(task, self.evaluate.tasks)
                raise ValueError(f"merge.protect names '{task}', which is not among evaluate.tasks{hint}")
        for task in self.evaluate.weights:
            if task not in self.evaluate.tasks:
                hint = nearest(task, self.evaluate.tasks)
                raise ValueError(f"evaluate.weights names '{task}', which is not among evaluate.tasks{hint}")
        return self

    @model_validator(mode="after")
    def _fixed_merges_use_known_models(self) -> Self:
        known = [entry.id for entry in self.zoo.models]
        for merge in self.merge.merges:
            if merge.name in known:
                raise ValueError(f"merge '{merge.name}' has the name of a model or an earlier merge")
            for name in merge.models:
                if name not in known:
                    raise ValueError(f"merge '{merge.name}' uses '{name}', which is no model{nearest(name, known)}")
            known.append(merge.name)
        return self


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe, for editors."""
    schema = Recipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: The YAML file.
        overrides: ``key=value`` settings; keys are dotted, list items by number or by id
            (``zoo.models.math.model=/new/path``), values are YAML.

    Raises:
        RecipeError: for anything wrong, with file and line, what was read, and the nearest right name.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"{path}: there is no such recipe file")
    try:
        text = path.read_text()
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: not a text file") from None
    return read_recipe(text, path, overrides)


def read_recipe(text: str, path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read, override and check the text of a recipe.

    Args:
        text: YAML.
        path: What errors call it; relative paths in it are meant from there.
        overrides: As for `load_recipe`.

    Raises:
        RecipeError: as `load_recipe`.
    """
    try:
        document = YAML(typ="rt").load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        line = mark.line + 1 if mark else 1
        raise RecipeError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except YAMLError as error:  # a control character, for one
        raise RecipeError(f"{path}:1: not valid YAML: {first_line(error)}") from None
    if not isinstance(document, dict):
        raise RecipeError(f"{path}:1: a recipe is a mapping with the keys {', '.join(Recipe.model_fields)}")
    overridden: set[tuple[str | int, ...]] = set()
    for setting in overrides or []:
        overridden.add(_override(document, setting))
    return _validated(_Source(path, document, overridden))


def override(recipe: Recipe, settings: list[str]) -> Recipe:
    """Return a recipe with some ``key=value`` settings changed.

    Raises:
        RecipeError: if a setting is wrong.
    """
    document = recipe.model_dump(mode="json")
    overridden = {_override(document, setting) for setting in settings}
    return _validated(_Source(Path.cwd() / "recipe", document, overridden))


def checked(document: dict[str, Any]) -> Recipe:
    """Return the recipe that a plain document stands for; its paths are absolute already.

    Raises:
        RecipeError: if it is none, worded as for a file but without lines.
    """
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        source = _Source(Path("recipe"), document, set())
        lines = (source.explain(item, document) for item in error.errors())
        raise RecipeError("; ".join(line.removeprefix("recipe:1: ") for line in lines)) from None


def section_of(kind: type[S], key: str, settings: list[str]) -> S:
    """Return a section of a recipe that has no file: its defaults, with some ``key=value`` settings changed.

    Raises:
        RecipeError: if a setting is wrong.
    """
    document: dict[str, Any] = {key: {}}
    overridden = {_override(document, setting) for setting in settings}
    source = _Source(Path.cwd() / "recipe", document, overridden)
    plain = source.fill_in(document, ())
    try:
        return kind.model_validate(plain[key])
    except ValidationError as error:
        found = [{**item, "loc": (key, *item["loc"])} for item in error.errors()]
        raise RecipeError("\n".join(source.explain(item, plain) for item in found)) from None


def _validated(source: "_Source") -> Recipe:
    plain = source.fill_in(source.document, ())
    try:
        return Recipe.model_validate(plain)
    except ValidationError as error:
        raise RecipeError("\n".join(source.explain(item, plain) for item in error.errors())) from None


class _Source:
    """A recipe's text: finds the line that a key came from and words the errors."""

    PATH_KEYS = frozenset({"include", "labelled", "texts"})
    MODEL_KEYS = frozenset({"model", "base", "adapter"})

    def __init__(self, path: Path, document: Any, overridden: set[tuple[str | int, ...]]) -> None:
        self.path = path
        self.document = document
        self.overridden = overridden

    def place(self, location: tuple[str | int, ...]) -> str:
        """Return "file:line" of the innermost part of `location` that the file has."""
        if any(location[: len(key)] == key for key in self.overridden):
            return "command line"
        line, node = 1, self.document
        for part in location:
            marks = getattr(node, "lc", None)
            try:
                if marks is not None and marks.data and part in marks.data:
                    line = marks.data[part][0] + 1
                node = node[part]
            except (KeyError, IndexError, TypeError):
                break
        return f"{self.path}:{line}"

    def fill_in(self, node: Any, location: tuple[str | int, ...]) -> Any:
        """Return `node` as plain Python, with variables filled in and paths made absolute."""
        if isinstance(node, dict):
            return {str(key): self.fill_in(value, (*location, key)) for key, value in node.items()}
        if isinstance(node, list):
            return [self.fill_in(value, (*location, index)) for index, value in enumerate(node)]
        if isinstance(node, str):
            key = location[-1] if location else None
            if not node or key not in self.PATH_KEYS | self.MODEL_KEYS | {"encoder"}:
                return str(node)
            text = self._variables(str(node), location)
            if key == "encoder":  # an expert's id, or a directory
                return self._absolute(text) if (self.path.parent / Path(text).expanduser()).is_dir() else text
            if key == "texts" and text == "default":
                return text
            return absolute(text, self.path.parent) if key in self.MODEL_KEYS else self._absolute(text)
        if isinstance(node, bool) or node is None:
            return node
        return float(node) if isinstance(node, float) else int(node) if isinstance(node, int) else str(node)

    def _variables(self, text: str, location: tuple[str | int, ...]) -> str:
        def value(match: re.Match[str]) -> str:
            name = match[1]
            if name not in os.environ:
                key = ".".join(map(str, location))
                raise RecipeError(
                    f"{self.place(location)}: {key}: the environment variable {name} is not set (read '{text}'); "
                    f"set it, or override {key}=PATH"
                )
            return os.environ[name]

        return re.sub(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}", value, text)

    def _absolute(self, text: str) -> str:
        path = Path(text).expanduser()
        return str(path if path.is_absolute() else (self.path.parent / path).resolve())

    def explain(self, error: Any, plain: Any) -> str:
        """Return one line for one of pydantic's errors."""
        location = _without_tags(error["loc"], plain)
        key = ".".join(map(str, location)) or "recipe"
        place = self.place(location)
        if error["type"] == "extra_forbidden":
            known = list(_fields(location[:-1]))
            wrong = str(location[-1])
            hint = nearest(wrong, known) or f"; known keys: {', '.join(known)}"
            return f"{place}: {key}: unknown key (read {_short(error['input'])}){hint}"
        if error["type"] == "missing":
            return f"{place}: {key}: missing"
        message = error["msg"].removeprefix("Value error, ")
        read = "" if isinstance(error["input"], (dict, list)) else f" (read {_short(error['input'])})"
        return f"{place}: {key}: {message}{read}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _reachable(node: Any, part: str | int) -> bool:
    try:
        node[part]
    except (KeyError, IndexError, TypeError):
        return False
    return True


def _without_tags(location: tuple[str | int, ...], plain: Any) -> tuple[str | int, ...]:
    """Drop the parts of a pydantic location that name a union's branch instead of a key."""
    kept: list[str | int] = []
    node = plain
    for index, part in enumerate(location):
        if _reachable(node, part):
            node = node[part]
            kept.append(part)
        elif isinstance(node, dict) and index == len(location) - 1:
            kept.append(part)  # a missing key
    return tuple(kept)


def _fields(location: tuple[str | int, ...]) -> list[str]:
    """Return the keys that the section at `location` may have."""
    section: Any = Recipe
    for part in location:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part)
        if field is None:
            return []
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if section is None:
            return []
    return list(section.model_fields)


def _override(document: Any, setting: str) -> tuple[str | int, ...]:
    """Apply one ``key=value`` to the document; return where."""
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise RecipeError(f"override '{setting}' is not of the form key=value")
    try:
        value = YAML(typ="rt").load(text) if text else None
    except MarkedYAMLError as error:
        raise RecipeError(f"override '{setting}': the value is not valid YAML: {error.problem}") from None
    node, location = document, []
    parts = key.split(".")
    while parts:
        step: str | int
        if isinstance(node, list):
            step, taken = _item(node, parts, setting)
        else:
            step, taken = parts[0], 1
        parts = parts[taken:]
        location.append(step)
        if not parts:
            node[step] = value
        else:
            if isinstance(node, dict) and not isinstance(node.get(step), (dict, list)):
                node[step] = {}
            node = node[step]
    return tuple(location)


def _item(items: list[Any], parts: list[str], setting: str) -> tuple[int, int]:
    """Return the index of a list item given by number, id or name, and how many parts of the key name it.

    Ids may hold dots ("qwen2.5"), so the longest match wins.
    """
    names = [str(item.get("id", item.get("name"))) if isinstance(item, dict) else "" for item in items]
    for taken in range(len(parts), 0, -1):
        if ".".join(parts[:taken]) in names:
            return names.index(".".join(parts[:taken])), taken
    part = parts[0]
    if part.isdigit() and int(part) < len(items):
        return int(part), 1
    raise RecipeError(
        f"override '{setting}': there is no item '{part}'{nearest(part, names)} "
        f"(there are: {', '.join(name for name in names if name) or f'0 to {len(items) - 1}'})"
    )
