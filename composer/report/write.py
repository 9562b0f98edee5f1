"""Writing the report of a run."""

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from composer.artefacts import write_text
from composer.clustering import Cluster, Join
from composer.report.figures import dendrogram, heatmap, scores_plot
from composer.report.record import RunRecord
from composer.similarity import SimilarityMatrix


def write_report(record: RunRecord, directory: Path) -> Path:
    """Write `report.json` and `report.html` into a directory; return the path of the latter."""
    record.save(directory / "report.json")
    page = _template("report.html.j2").render(
        record=record,
        evidence=record.evidence,
        heatmap=heatmap(record.similarity, record.joins),
        scores=scores_plot(record.evidence),
        tasks=[task.task for task in record.evidence.subjects[0].scores.tasks],
        best=_best_by_task(record),
        gaps={one.other: one for one in record.evidence.differences},
        by_task=record.evidence.by_task,
        costs={**{one.cluster: one.cost for one in record.outcomes}, "all": record.cost},
    )
    return write_text(directory / "report.html", page)


def write_clusters(
    matrix: SimilarityMatrix,
    clusters: tuple[Cluster, ...],
    joined: tuple[Join, ...],
    threshold: float,
    skipped: dict[str, str],
    path: Path,
) -> Path:
    """Write a page with heatmap and dendrogram of a zoo, and why each model is where it is; return its path."""
    page = _template("clusters.html.j2").render(
        matrix=matrix,
        clusters=clusters,
        threshold=threshold,
        skipped=skipped,
        heatmap=heatmap(matrix, joined),
        dendrogram=dendrogram(matrix, joined, threshold),
    )
    return write_text(path, page)


def _template(name: str) -> Template:
    environment = Environment(
        loader=PackageLoader("composer.report", "."),
        autoescape=True,  # names of models and tasks come from other people
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _best_by_task(record: RunRecord) -> dict[str, float]:
    """Return the highest score that a model has on each task, to be set in bold."""
    subjects = [subject for subject in record.evidence.subjects if subject.real]
    return {
        task.task: max(subject.scores.task(task.task).mean for subject in subjects) for task in subjects[0].scores.tasks
    }
