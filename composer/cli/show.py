"""`show`: what a run found."""

import click

from composer.cli.options import json_option, print_json
from composer.errors import RecipeError
from composer.runs import Run, runs_root


@click.command("show")
@click.argument("run")
@json_option
def command(run: str, as_json: bool) -> None:
    """Show a run: its evidence, experts and where the report is. RUN is a path, a run's or a recipe's name."""
    found = Run.find(run, runs_root())
    if not (found.path / "report.json").is_file():
        events = found.events()
        stage = events[-1]["stage"] if events else "start"
        raise RecipeError(f"{found.name} is not finished (it stopped in '{stage}'); 'model-composer run' carries on")
    from composer.cli.tables import print_cost, print_evidence
    from composer.report.record import RunRecord

    record = RunRecord.load(found.path / "report.json")
    if as_json:
        print_json(record.model_dump(mode="json"))
        return
    print_evidence(record.evidence)
    for expert in record.composite.experts:
        click.echo(f"expert {expert.id}: {expert.reason}")
    for model, reason in record.composite.left_out.items():
        click.echo(f"left out {model}: {reason}")
    print_cost(record.cost, record.seconds, record.scoring)
    click.echo(f"report: {found.path / 'report.html'}")
