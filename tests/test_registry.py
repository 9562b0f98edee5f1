"""Registries: names, lazy parts, collisions."""

import pytest

from composer.errors import RecipeError
from composer.registry import Registry


def test_parts_are_found_lazily() -> None:
    registry: Registry[object] = Registry("thing")
    registry.register("dumps", "json:dumps")
    import json

    assert registry.get("dumps") is json.dumps
    assert registry.names() == ["dumps"]


def test_a_name_is_taken_once() -> None:
    registry: Registry[object] = Registry("thing")
    registry.register("one", 1)
    with pytest.raises(ValueError, match="registered twice"):
        registry.register("one", 2)


def test_an_unknown_name_gets_the_nearest() -> None:
    registry: Registry[object] = Registry("operator")
    registry.register("linear", 1)
    with pytest.raises(RecipeError, match="no operator 'liner'; did you mean 'linear'"):
        registry.get("liner")
