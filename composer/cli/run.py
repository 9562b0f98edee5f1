"""`run`: a recipe, end to end."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from composer.cli.options import json_option, print_json, recipe_arguments
from composer.errors import NotApprovedError
from composer.recipe import load_recipe
from composer.runs import Run, runs_root

if TYPE_CHECKING:
    from graphs.state import ComposeContext


@click.command("run")
@recipe_arguments
@click.option("--yes", is_flag=True, help="Approve the plan without asking; for scripts.")
@click.option("--keep-serving", is_flag=True, help="Leave the endpoint up when the report is written.")
@json_option
def command(recipe: Path, overrides: tuple[str, ...], yes: bool, keep_serving: bool, as_json: bool) -> None:
    """Run a recipe: compose, serve, evaluate, report.

    A run that was interrupted or killed carries on where it stopped: give the same command again.
    """
    loaded = load_recipe(recipe, list(overrides))
    os.environ.setdefault("LANGGRAPH_STRICT_MSGPACK", "true")
    run = Run.of(loaded, runs_root())
    from graphs.drive import advance, begin_again_if_gone

    gone = begin_again_if_gone(run)
    if gone is not None:
        click.echo(f"note: {gone}; composing it again", err=True)
    if run.finished and not keep_serving:
        _tell(run, as_json)
        return
    from composer.cli.progress import progress_bar
    from graphs.state import ComposeContext

    with run.locked():
        run.create(loaded)
        context = ComposeContext(run_path=str(run.path), yes=yes, keep_serving=keep_serving)
        try:
            with progress_bar(quiet=as_json) as progress:
                waiting = advance(run, context, progress)
            if waiting is not None:
                _ask(waiting, context, as_json)
                with progress_bar(quiet=as_json) as progress:
                    advance(run, context, progress, yes=True)
            _tell(run, as_json)
            if keep_serving:
                from composer.cli.serve import serve_until_stopped

                with progress_bar(quiet=as_json) as progress:
                    server = context.session.serving(str(run.composite.resolve()), progress)
                serve_until_stopped(server, quiet=as_json)
        finally:
            context.session.close()


def _ask(waiting: dict[str, Any], context: "ComposeContext", as_json: bool) -> None:
    """Show the plan and wait for a yes.

    Raises:
        NotApprovedError: if the answer is no, or there is nobody to ask.
    """
    from composer.cli.tables import print_plan
    from composer.planning import Plan
    from composer.zoo.checkpoint import Zoo

    plan = Plan.load(waiting["plan"])
    if as_json:
        print_json({"waiting": "approval", "plan": plan.model_dump(mode="json")})
    else:
        print_plan(plan, Zoo.load(context.session.run.path / "zoo.json"))
    if as_json or not sys.stdin.isatty():
        raise NotApprovedError("the plan waits for approval; run again with --yes, or on a terminal")
    if not click.confirm("Go ahead?"):
        raise NotApprovedError("the plan was not approved; nothing was made")


def _tell(run: Run, as_json: bool) -> None:
    """Print what the run found."""
    from composer.evaluation.evidence import Evidence

    evidence = Evidence.load(run.path / "evidence.json")
    if as_json:
        print_json(
            {
                "run": str(run.path),
                "report": str(run.path / "report.html"),
                "evidence": evidence.model_dump(mode="json"),
            }
        )
        return
    from composer.cli.tables import print_evidence
    from composer.mixture import Composite

    print_evidence(evidence)
    composite = Composite.open(run.composite)
    router = composite.router or composite.gates
    for warning in router.warnings if router else ():
        click.echo(f"warning: router: {warning}")
    click.echo(f"report: {run.path / 'report.html'}")
    click.echo(f"serve it: model-composer serve {run.name}")
