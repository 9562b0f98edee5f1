"""`router`: what the router of a run's composite does, and its calibration."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from composer.cli.options import json_option, print_json
from composer.errors import RecipeError, RouterError
from composer.runs import Run, runs_root

if TYPE_CHECKING:
    from composer.mixture import Composite
    from composer.mixture.tuning import Observed
    from routers import Router

TEXTS = click.option(
    "--texts", type=click.Path(path_type=Path, dir_okay=False), help="A file of prompts without labels, one a line."
)


@click.group("router")
def command() -> None:
    """Report what the router of a composite does, calibrate it, or ask it about a prompt."""


@command.command("report")
@click.argument("run")
@TEXTS
@json_option
def report(run: str, texts: Path | None, as_json: bool) -> None:
    """Show where the proxy items (and other prompts) go, and what that is worth. RUN is a path or a run's name."""
    from composer.cli.tables import print_routing
    from composer.mixture.tuning import report as make

    found = _find(run)
    composite, router, seen = _observed(found, texts, quiet=as_json)
    made = make(router.manifest.policy, seen, _costs(composite))
    if as_json:
        print_json(made.model_dump(mode="json"))
    else:
        print_routing(made, composite)
        _say_what_was_learnt(found)


def _say_what_was_learnt(found: Run) -> None:
    """Warn that a router is looked at on what it learnt from."""
    if found.recipe.mixture.router.learn_from == "proxy":
        click.echo("note: this router learnt from these very items, so that its figures here flatter it")


@command.command("tune")
@click.argument("run")
@TEXTS
@click.option(
    "--abstain", type=click.FloatRange(0, 1, max_open=True), help="Share of prompts to leave to the fallback."
)
@click.option("--write", is_flag=True, help="Give the run a composite with the calibrated router.")
@json_option
def tune(run: str, texts: Path | None, abstain: float | None, write: bool, as_json: bool) -> None:
    """Calibrate confidence on the proxy items, and find the threshold below which the fallback had better answer."""
    from composer.cli.tables import print_routing
    from composer.mixture.build import with_policy
    from composer.mixture.tuning import tune as make

    found = _find(run)
    composite, router, seen = _observed(found, texts, quiet=as_json)
    tuned = make(router.manifest.policy, seen, abstain)
    if write:
        with found.locked():
            found.link_composite(with_policy(found.composite.resolve(), tuned.policy, found.store))
    if as_json:
        print_json(tuned.model_dump(mode="json"))
        return
    print_routing(tuned.after, composite)
    _say_what_was_learnt(found)
    before, after = tuned.before, tuned.after
    if before.calibration is not None and after.calibration is not None:
        click.echo(
            f"calibration error {before.calibration:.3f} -> {after.calibration:.3f}, on {tuned.labelled} items that "
            "some experts answer better than others"
        )
    if before.value:
        click.echo(f"value on the proxy items {before.value['routed']:.4f} -> {after.value['routed']:.4f}")
    policy = tuned.policy
    keys = f"threshold: {policy.threshold!r}, temperature: {policy.temperature!r}"
    click.echo(f"in the recipe: mixture: {{router: {{{keys}}}}}")
    click.echo("the run's composite has it now" if write else "--write gives it to the run's composite")


@command.command("ask")
@click.argument("run")
@click.argument("prompt")
@json_option
def ask(run: str, prompt: str, as_json: bool) -> None:
    """Say which expert a prompt goes to, and why."""
    from composer.mixture import load_router

    router = load_router(_find(run).composite.resolve())
    if router is None:
        raise RouterError("the composite has a single expert; there is nothing to route")
    decision = router.route(prompt)
    if as_json:
        print_json(decision.model_dump(mode="json"))
        return
    click.echo(f"{decision.expert} ({decision.reason}, probability of the likeliest {decision.confidence:.2f})")
    chances = router.manifest.policy.probabilities(decision.scores)
    for name in sorted(chances, key=lambda one: -chances[one]):
        click.echo(f"  {chances[name]:6.3f}  {name}")


def _find(run: str) -> Run:
    found = Run.find(run, runs_root())
    if not found.composite.exists():
        raise RecipeError(f"{found.name} has no composite yet; 'model-composer run' with its recipe makes it")
    return found


def _observed(run: Run, texts: Path | None, *, quiet: bool) -> "tuple[Composite, Router, list[Observed]]":
    from composer.cli.progress import progress_bar
    from composer.mixture import Composite, load_router
    from composer.mixture.tuning import observe
    from composer.progress import Step
    from graphs.state import Session

    composite = Composite.open(run.composite.resolve())
    router = load_router(run.composite.resolve())
    if router is None:
        raise RouterError("the composite has a single expert; there is nothing to route")
    session = Session(run)
    try:
        with progress_bar(quiet=quiet) as progress:
            progress(Step(stage="router", message="scoring experts on the proxy items"))
            return composite, router, observe(router, composite, session.known, _lines(texts))
    finally:
        session.close()


def _lines(texts: Path | None) -> list[str]:
    if texts is None:
        return []
    try:
        return [line for line in texts.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"--texts: {texts} cannot be read: {error}") from error


def _costs(composite: "Composite") -> dict[str, float]:
    return {expert.id: float(expert.checkpoint.parameters) for expert in composite.experts}
