"""Writing the report of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from composer.artefacts import write_text
from composer.clustering import Cluster, Join
from composer.evaluation import Evidence
from composer.merging.plan import MergeOutcome
from composer.mixture.licences import licence_notes
from composer.planning import Plan
from composer.report.figures import dendrogram, heatmap, scores_plot
from composer.report.record import RunRecord
from composer.similarity import SimilarityMatrix


def write_report(record: RunRecord, directory: Path) -> Path:
    """Write `report.json` and `report.html` into a directory; return the path of the latter."""
    record.save(directory / "report.json")
    page = _template("report.html.j2").render(
        record=record,
        heatmap=heatmap(record.similarity, record.joins),
        dendrogram=dendrogram(record.similarity, record.joins, record.recipe["cluster"]["threshold"]),
        licences=licence_notes({k: v for one in record.composite.experts for k, v in one.licences.items()}),
        scores=scores_plot(record.evidence),
        **_of_evidence(record.evidence),
        outcomes=record.outcomes,
        merges=record.plan.merges,
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


def evidence_table(evidence: Evidence) -> str:
    """Return the report's table of evidence as HTML; all text in it is escaped."""
    return _template("evidence.html.j2").render(**_of_evidence(evidence))


def merge_trees(outcomes: Sequence[MergeOutcome], plan: Plan) -> str:
    """Return the report's merge trees as HTML; all text in it is escaped."""
    return _template("trees.html.j2").render(outcomes=outcomes, merges=plan.merges)


def parts_style() -> str:
    """Return the CSS of `evidence_table` and `merge_trees`."""
    return _template("parts.css.j2").render()


def _template(name: str) -> Template:
    environment = Environment(
        loader=PackageLoader("composer.report", "."),
        autoescape=True,  # names of models and tasks come from other people
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _of_evidence(evidence: Evidence) -> dict[str, Any]:
    """Return what the table of evidence is filled with."""
    return {
        "evidence": evidence,
        "tasks": [task.task for task in evidence.subjects[0].scores.tasks],
        "best": _best_by_task(evidence),
        "gaps": {one.other: one for one in evidence.differences},
        "by_task": evidence.by_task,
    }


def _best_by_task(evidence: Evidence) -> dict[str, float]:
    """Return the highest score that a model has on each task, to be set in bold."""
    subjects = [subject for subject in evidence.subjects if subject.real]
    return {
        task.task: max(subject.scores.task(task.task).mean for subject in subjects) for task in subjects[0].scores.tasks
    }
