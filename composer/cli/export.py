"""`export`: a composite for elsewhere."""

from pathlib import Path

import click

from composer.errors import RecipeError
from composer.runs import Run, runs_root


@click.command("export")
@click.argument("run")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The directory or file to write.")
@click.option(
    "--format", "kind", type=click.Choice(["huggingface", "litellm"]), default="huggingface", show_default=True,
    help="A directory with card, manifest, router and experts; or a list of models for a LiteLLM proxy.",
)  # fmt: skip
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="Where the composite is served.")
def command(run: str, out: Path, kind: str, url: str) -> None:
    """Write the composite of a run as one directory that needs nothing else, or as a proxy's list of models.

    The directory can be uploaded as a repository, and served anywhere: model-composer serve DIRECTORY
    """
    found = Run.find(run, runs_root())
    if not found.composite.exists():
        raise RecipeError(f"{found.name} has no composite yet; 'model-composer run' with its recipe makes it")
    from composer.artefacts import write_text
    from composer.cli.progress import progress_bar
    from composer.mixture import Composite
    from composer.mixture.export import export_directory, litellm_models

    if kind == "litellm":
        write_text(out, litellm_models(Composite.open(found.composite.resolve()), url.rstrip("/")))
    else:
        with progress_bar() as progress:
            export_directory(found.composite.resolve(), out.resolve(), found.store, progress)
    click.echo(str(out))
