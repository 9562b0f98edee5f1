"""Run directories: everything one run leaves behind, in one place.

    <root>/<name>-<id>/   recipe.json, progress (SQLite), events.jsonl, one file per finished stage, report
    <root>/store/         content-addressed artefacts, shared by all runs

The id is a hash of the resolved recipe and of the size and time of every local model file, so the same recipe on the
same inputs finds its run again, and changed inputs start a new one. (A model on the hub counts by id and revision.)
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from composer.artefacts import Store, digest, write_text
from composer.errors import BusyError, RecipeError
from composer.recipe import Recipe
from composer.registry import nearest

ROOT_VARIABLE = "MODEL_COMPOSER_RUNS"
_INPUT_FILES = ("*.json", "*.safetensors", "*.gguf", "*.jinja", "*.yaml", "*.jsonl", "*.py")


AGAIN = "begun again"
"""The event of a run that was begun again."""


def runs_root() -> Path:
    """Return where runs live: $MODEL_COMPOSER_RUNS, else ./runs."""
    return Path(os.environ.get(ROOT_VARIABLE, "runs")).resolve()


class Run:
    """One run directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = Store(path.parent / "store")

    @classmethod
    def of(cls, recipe: Recipe, root: Path) -> "Run":
        """Return the run of a recipe on its inputs as they are now; nothing is written."""
        models = [text for entry in recipe.zoo.models for text in (entry.model, entry.adapter)]
        texts = [recipe.mixture.router.labelled, recipe.mixture.router.encoder, recipe.probes.texts]
        inputs = [*models, recipe.zoo.base, recipe.evaluate.include, *texts]
        key = digest([recipe.model_dump(mode="json"), [_status(Path(path)) for path in inputs if path]])
        return cls(root / f"{recipe.name}-{key[:8]}")

    @classmethod
    def find(cls, name: str, root: Path) -> "Run":
        """Return a run by path, by directory name, or the newest one of a recipe's name.

        Raises:
            RecipeError: if there is none.
        """
        for path in (Path(name), root / name):
            if (path / "recipe.json").is_file():
                return cls(path.resolve())
        runs = cls.all(root)
        named = [run for run in runs if run.path.name.rpartition("-")[0] == name]
        if named:
            return named[0]
        hint = nearest(name, [run.path.name for run in runs])
        raise RecipeError(f"there is no run '{name}' under {root}{hint} ('model-composer ls' lists them)")

    @classmethod
    def all(cls, root: Path) -> list["Run"]:
        """Return all runs, newest first."""
        found = [path.parent for path in root.glob("*/recipe.json")]
        return [cls(path) for path in sorted(found, key=lambda path: -(path / "recipe.json").stat().st_mtime)]

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.path.name

    @cached_property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return Recipe.model_validate_json((self.path / "recipe.json").read_text())

    @property
    def finished(self) -> bool:
        """Whether the last stage has finished, since the run was begun or begun again."""
        over = [one["stage"] for one in self.events() if one["event"] in ("finished", AGAIN)]
        return "report" in over[len(over) - over[::-1].index("run") if "run" in over else 0 :]

    @property
    def checkpoints(self) -> Path:
        """LangGraph's SQLite file."""
        return self.path / "progress.sqlite"

    @property
    def logs(self) -> Path:
        """The engines' logs."""
        return self.path / "logs"

    @property
    def composite(self) -> Path:
        """A link to the composite's directory, once there is one."""
        return self.path / "composite"

    def link_composite(self, directory: Path) -> None:
        """Point the link at the composite."""
        link = self.path / f".composite.{os.getpid()}"
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(directory, self.path))
        link.replace(self.composite)

    def begin_again(self) -> None:
        """Forget how far it came; what its stages keep in the store stays, and is used where it is still right."""
        for file in self.path.glob(f"{self.checkpoints.name}*"):
            file.unlink()
        self.composite.unlink(missing_ok=True)
        self.log("run", AGAIN)

    def create(self, recipe: Recipe) -> None:
        """Make the directory and write the resolved recipe, unless it is there."""
        if not (self.path / "recipe.json").is_file():
            write_text(self.path / "recipe.json", recipe.model_dump_json(indent=2) + "\n")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process.

        Raises:
            BusyError: if another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.path / "lock", timeout=0):
                yield
        except Timeout:
            raise BusyError(f"{self.path}: another process is working on this run; wait for it or stop it") from None

    def log(self, stage: str, event: str, **details: Any) -> None:
        """Append one event to the run's log."""
        row = {"time": round(time.time(), 3), "stage": stage, "event": event, **details}
        with (self.path / "events.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def events(self) -> list[dict[str, Any]]:
        """Return all whole events; a line cut off by a kill is passed over."""
        file = self.path / "events.jsonl"
        events = []
        for line in file.read_text().splitlines() if file.is_file() else []:
            try:
                events.append(json.loads(line))
            except ValueError:
                continue
        return events


def _status(path: Path) -> list[Any]:
    """Return name, size and time of the files that make up an input: a checkpoint, or a folder of tasks."""
    files = (
        [path]
        if path.is_file()
        else sorted({file for pattern in _INPUT_FILES for file in path.rglob(pattern) if file.is_file()})
    )
    return [str(path), [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]]
