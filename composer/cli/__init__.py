"""The command line. One file per verb; nothing heavy is imported before it is needed."""

import logging
import os
import shutil
import sqlite3
import sys
import warnings
from importlib import import_module
from typing import Any

import click

from composer import __version__
from composer.errors import INTERRUPTED, ComposerError, DiskFullError, is_disk_full

VERBS = (
    "chat", "ui", "mcp", "run", "plan", "validate", "inspect", "cluster", "serve", "keys", "ls", "show", "operators",
    "simmerge", "router", "export", "schema",
)  # fmt: skip


class _Verbs(click.Group):
    """Imports a verb when it is called, or when its help is shown."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        command: click.Command = import_module(f"composer.cli.{name}").command
        return command

    def resolve_command(self, context: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(context, args)
        except click.UsageError:
            from composer.registry import nearest

            hint = nearest(args[0], list(VERBS))
            raise click.UsageError(f"there is no command '{args[0]}'{hint} (see --help)") from None


def _quiet_libraries() -> None:
    """Keep other libraries' progress bars and warnings off the terminal; ours say what is going on.

    Before they are imported, since some read their settings only then.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger().setLevel(logging.ERROR)
    for name in ("lm_eval", "mergekit", "transformers", "datasets", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def _no_room_for_runs() -> bool:
    """Return whether the runs' disk has under a megabyte free: SQLite words that as "disk I/O error"."""
    from composer.runs import runs_root

    root = runs_root()
    return root.exists() and shutil.disk_usage(root).free < 1 << 20


@click.command(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="model-composer")
def cli() -> None:
    """Compose a zoo of LLM checkpoints into one better model, without training.

    Exit codes: 0 done, 2 recipe or usage, 3 zoo, 4 merge, 5 serving, 6 evaluation, 7 disk full,
    8 not approved, 9 run is busy, 10 predictor or corpus, 11 router, 130 interrupted.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; errors a user can act on become one line and an exit code."""
    _quiet_libraries()
    try:
        code = cli.main(arguments, prog_name="model-composer", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except ComposerError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except click.exceptions.Abort:
        click.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(0)
    except (OSError, sqlite3.Error) as error:
        full = is_disk_full(error) or _no_room_for_runs()
        click.echo(f"error: {error}{'; free some space, then run again' if full else ''}", err=True)
        sys.exit(DiskFullError.exit_code if full else ComposerError.exit_code)
