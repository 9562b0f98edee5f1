"""Writing the report of a run."""

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from composer.artefacts import write_text
from composer.report.figures import heatmap, scores_plot
from composer.report.record import RunRecord


def write_report(record: RunRecord, directory: Path) -> Path:
    """Write `report.json` and `report.html` into a directory; return the path of the latter."""
    record.save(directory / "report.json")
    environment = Environment(
        loader=PackageLoader("composer.report", "."),
        autoescape=True,  # names of models and tasks come from other people
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        record=record,
        evidence=record.evidence,
        heatmap=heatmap(record.similarity),
        scores=scores_plot(record.evidence),
        tasks=[task.task for task in record.evidence.subjects[0].scores.tasks],
        best=_best_by_task(record),
        gaps={one.other: one for one in record.evidence.differences},
    )
    return write_text(directory / "report.html", page)


def _best_by_task(record: RunRecord) -> dict[str, float]:
    """Return the highest score of each task, to be set in bold."""
    subjects = record.evidence.subjects
    return {
        task.task: max(subject.scores.task(task.task).mean for subject in subjects) for task in subjects[0].scores.tasks
    }
