"""How long work tells the outside that it is moving.

Rooms call a `Progress` that they are given; they do not know whether a progress bar, a log file or nobody
listens.
"""

from collections.abc import Callable
from typing import TypeAlias

from composer.value import Value


class Step(Value):
    """One sign of life from a stage."""

    stage: str
    """The room that is working, e.g. "merge"."""
    message: str
    """What it is doing, for people."""
    done: int | None = None
    total: int | None = None
    """`done` of `total` units, where the work can be counted."""


Progress: TypeAlias = Callable[[Step], None]


def silent(step: Step) -> None:
    """Ignore progress."""
