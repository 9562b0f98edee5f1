"""`ls`: what has been run."""

from datetime import datetime

import click

from composer.cli.options import json_option, print_json
from composer.runs import Run, runs_root


@click.command("ls")
@json_option
def command(as_json: bool) -> None:
    """List all runs, newest first."""
    rows = []
    for run in Run.all(runs_root()):
        events = run.events()
        stage = "done" if run.finished else (events[-1]["stage"] if events else "created")
        rows.append(
            {
                "run": run.name,
                "models": len(run.recipe.zoo.models),
                "strategy": run.recipe.merge.strategy,
                "stage": stage,
                "last": events[-1]["time"] if events else None,
            }
        )
    if as_json:
        print_json(rows)
        return
    if not rows:
        click.echo(f"no runs under {runs_root()}")
        return
    width = max(len(row["run"]) for row in rows)
    for row in rows:
        last = datetime.fromtimestamp(row["last"]).strftime("%Y-%m-%d %H:%M") if row["last"] else "-"
        click.echo(f"{row['run']:{width}}  {row['stage']:<9} {row['models']:>3} models  {row['strategy']:<10} {last}")
