"""Names for exchangeable parts: operators, strategies, routers, engines.

A part is registered under a name, as an object or lazily as "module:attribute", so that listing names never
imports torch. Other distributions add parts through the entry point group ``model_composer.<kind>``.
"""

from collections.abc import Iterator
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from typing import Generic, TypeVar, cast

from composer.errors import RecipeError

T = TypeVar("T")


def nearest(name: str, known: list[str]) -> str:
    """Return "; did you mean 'x'?" for the closest of `known`, or an empty string."""
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


class Registry(Generic[T]):
    """A mapping from names to parts of one kind."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._parts: dict[str, T | str] = {}
        self._plugins_read = False

    def register(self, name: str, part: T | str) -> None:
        """Add `part` (an object, or "module:attribute" imported on first use) under `name`.

        Raises:
            ValueError: if the name is taken.
        """
        if name in self._parts:
            raise ValueError(f"{self.kind} '{name}' is registered twice")
        self._parts[name] = part

    def names(self) -> list[str]:
        """Return all names, in order of registration; plug-ins come last."""
        self._read_plugins()
        return list(self._parts)

    def get(self, name: str) -> T:
        """Return the part called `name`.

        Raises:
            RecipeError: if there is none, with the nearest name.
        """
        self.check(name)
        part = self._parts[name]
        if isinstance(part, str):
            module, _, attribute = part.partition(":")
            part = cast("T", getattr(import_module(module), attribute))
            self._parts[name] = part
        return part

    def check(self, name: str) -> str:
        """Return `name` if it is registered, else raise `RecipeError` naming the ones that are."""
        known = self.names()
        if name not in known:
            raise RecipeError(f"there is no {self.kind} '{name}'{nearest(name, known)} (there are: {', '.join(known)})")
        return name

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def _read_plugins(self) -> None:
        if not self._plugins_read:
            self._plugins_read = True
            for point in entry_points(group=f"model_composer.{self.kind}"):
                self.register(point.name, point.value)
