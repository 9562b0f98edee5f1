"""Several experts of one shape in one engine. Not built yet: no models share one."""

from collections.abc import Sequence
from typing import Any

from composer.zoo import Checkpoint


def obstacle(checkpoints: Sequence[Checkpoint]) -> str | None:
    """Return why some checkpoints cannot share an engine."""
    return "not built yet"


def arguments(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Return what an engine of several is told on its command line."""
    return []


def environment() -> dict[str, str]:
    """Return environment variables of an engine of several."""
    return {}


def request(index: int) -> dict[str, Any]:
    """Return what a request to one of the experts must hold."""
    return {}
