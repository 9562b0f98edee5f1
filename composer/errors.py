"""Every way a command can end badly, each with its own exit code.

A message is one line: the value, the file or key it came from, and the way out.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class ComposerError(Exception):
    """Something the user can act on; printed as one line, never as a traceback."""

    exit_code = 1


class RecipeError(ComposerError):
    """The recipe, an override or an argument is wrong."""

    exit_code = 2


class ZooError(ComposerError):
    """A checkpoint cannot be used: missing, truncated, unsafe or numerically broken."""

    exit_code = 3


class MergeError(ComposerError):
    """A merge could not be made."""

    exit_code = 4


class ServeError(ComposerError):
    """The endpoint could not be started, or stopped answering."""

    exit_code = 5


class EvaluationError(ComposerError):
    """A task could not be loaded or scored."""

    exit_code = 6


class DiskFullError(ComposerError):
    """The disk filled up; nothing half-written was left behind."""

    exit_code = 7


class NotApprovedError(ComposerError):
    """The plan was not approved; nothing was made."""

    exit_code = 8


class BusyError(ComposerError):
    """Another process is working on the same run."""

    exit_code = 9


class PredictorError(ComposerError):
    """A corpus or predictor cannot be used: of another version, too small, or none at all."""

    exit_code = 10


class RouterError(ComposerError):
    """A router cannot be built, loaded or tuned."""

    exit_code = 11


INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells expect it."""


class CancelledError(ComposerError):
    """A run was told to stop; it carries on from there when it is run again."""

    exit_code = INTERRUPTED


def first_line(error: BaseException) -> str:
    """Return the first line of what a library says is wrong, or the error's name if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error says that the disk is full.

    Libraries say so in their own words (safetensors raises its own type with the system's text, SQLite has a text of
    its own), so the text is looked at too.
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left on device" in str(error) or "database or disk is full" in str(error)


@contextmanager
def disk_errors(path: object) -> Iterator[None]:
    """Turn "no space left on device" while writing `path` into a `DiskFullError`."""
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            raise DiskFullError(f"{path}: no space left on the disk; free some, then run again") from error
        raise
