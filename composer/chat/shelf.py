"""What a conversation may talk about: the models and tasks of a recipe, or of a folder of checkpoints.

Door: `open_shelf`.
"""

import re
from collections.abc import Iterable
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from composer.artefacts import Store
from composer.chat.names import matching, nearest_names
from composer.errors import RecipeError, ZooError
from composer.recipe import load_recipe
from composer.zoo import Description
from composer.zoo.references import ModelReference

QUICKSTART = Path("recipes") / "quickstart.yaml"
"""What is talked about where nothing else is named."""
_NO_ID = re.compile(r"[^A-Za-z0-9._-]+")


class Shelf:
    """Models and tasks that requests are about; nothing outside of it can be asked for."""

    def __init__(self, path: Path, document: dict[str, Any], store: Store) -> None:
        """Take what a recipe says.

        Args:
            path: The recipe or the folder.
            document: The recipe as plain values, all paths absolute; `evaluate` may be missing.
            store: Remembers what GGUF files describe.
        """
        self.path, self.document, self.store = path, document, store
        self._described: dict[str, Description | ZooError | None] = {}

    @cached_property
    def models(self) -> tuple[str, ...]:
        """Ids of all models."""
        return tuple(entry["id"] for entry in self.document["zoo"]["models"])

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """Tasks of the recipe, and those in its folder of tasks."""
        section = self.document.get("evaluate", {})
        named = list(section.get("tasks", ()))
        folder = Path(section["include"]) if section.get("include") else None
        for file in sorted(folder.glob("*.yaml")) if folder else ():
            found = re.search(r"^task:\s*([\w.-]+)\s*$", file.read_text(errors="replace"), re.MULTILINE)
            if found and found[1] not in named:
                named.append(found[1])
        return tuple(named)

    def check(self, name: str) -> None:
        """Refuse a name that is no model's.

        Raises:
            RecipeError: naming the nearest ones.
        """
        if name not in self.models:
            near = " or ".join(f"'{one}'" for one in nearest_names(name, self.models))
            raise RecipeError(f"there is no model '{name}' on the shelf; did you mean {near}?")

    def entry(self, name: str) -> dict[str, Any]:
        """Return what the recipe says of a model."""
        return next(entry for entry in self.document["zoo"]["models"] if entry["id"] == name)

    def described(self, name: str) -> Description | None:
        """Return what a model's headers say of it; None where that would take a download.

        Raises:
            ZooError: if it cannot be used.
        """
        if name not in self._described:
            self._described[name] = self._describe(name)
        found = self._described[name]
        if isinstance(found, ZooError):
            raise found
        return found

    def _describe(self, name: str) -> "Description | ZooError | None":
        from composer.zoo import describe
        from composer.zoo.references import downloads

        entry = {key: self.entry(name).get(key) for key in ModelReference.model_fields}
        reference = ModelReference.model_validate(entry)
        try:
            if reference.repository is not None or downloads(reference):
                return None
            code = bool(self.document["zoo"].get("trust_remote_code"))
            return describe(name, reference, self.store, trust_remote_code=code)
        except ZooError as error:
            return error

    def parameters(self, names: Iterable[str]) -> dict[str, int]:
        """Return the number of parameters of those models of which it is known."""
        found = {}
        for name in names:
            try:
                description = self.described(name)
            except ZooError:
                continue
            if description is not None:
                found[name] = description.parameters
        return found

    def task(self, said: str) -> tuple[str, ...]:
        """Return the tasks that may be meant; where the shelf has none, lm-eval's task of exactly that name."""
        own = matching(said, self.tasks)
        if own:
            return own
        wanted = said.lower().replace(" ", "_")
        known = lm_eval_tasks()
        return (known[wanted],) if wanted in known else ()

    def nearest_tasks(self, said: str) -> tuple[str, ...]:
        """Return tasks whose names look like what was said."""
        return nearest_names(said, self.tasks) or nearest_names(said, list(lm_eval_tasks().values()))


@cache
def lm_eval_tasks() -> dict[str, str]:
    """Return the names of lm-eval's tasks by their lower-case form, from its file names: importing it takes seconds.

    A plan loads the tasks themselves, so a name that is only a file's is found out before anything is made.
    """
    spec = find_spec("lm_eval")
    home = Path(spec.origin).parent / "tasks" if spec and spec.origin else None
    if home is None:
        return {}
    return {file.stem.lower(): file.stem for file in home.rglob("*.yaml") if not file.stem.startswith("_")}


def open_shelf(path: Path | None, store: Store) -> Shelf:
    """Return what a conversation may talk about.

    Args:
        path: A recipe or a folder of checkpoints; by default the quickstart recipe, if it is here.
        store: Remembers what GGUF files describe.

    Raises:
        RecipeError: if there is no such thing, or no checkpoint in it.
    """
    if path is None:
        places = (Path.cwd(), Path(__file__).resolve().parents[2])
        found = next((place / QUICKSTART for place in places if (place / QUICKSTART).is_file()), None)
        if found is None:
            raise RecipeError("which models? give --zoo a recipe or a folder of checkpoints")
        path = found
    if path.is_dir():
        return Shelf(path.resolve(), _of_folder(path.resolve()), store)
    recipe = load_recipe(path)
    return Shelf(path.resolve(), recipe.model_dump(mode="json", exclude_defaults=True), store)


def _of_folder(folder: Path) -> dict[str, Any]:
    """Return a recipe's document of all checkpoints in a folder; what judges them is asked for later."""
    homes = [folder] if (folder / "config.json").is_file() else []
    homes += [one for one in sorted(folder.iterdir()) if (one / "config.json").is_file() or one.suffix == ".gguf"]
    if not homes:
        raise RecipeError(f"{folder}: no checkpoint in it (a directory with a config.json, or a GGUF file)")
    models: dict[str, dict[str, Any]] = {}
    for home in homes:
        name = _NO_ID.sub("-", home.stem if home.suffix == ".gguf" else home.name).strip("-._")[:80] or "model"
        while name in models:
            name += "-2"
        models[name] = {"id": name, "model": str(home)}
    name = _NO_ID.sub("-", folder.name).strip("-._")[:70] or "composite"
    name = f"{name}-composite" if name in models else name
    return {"name": name, "zoo": {"models": list(models.values())}}
