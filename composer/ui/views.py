"""Runs and zoos as what is shown: text without control characters, tables, and figures that are pictures."""

import base64
import unicodedata
from functools import lru_cache
from pathlib import Path

from composer.chat.desk import Compared, Desk
from composer.chat.draft import Draft
from composer.chat.saving import as_yaml
from composer.errors import ComposerError, ZooError
from composer.runs import Run
from composer.value import Value

COLUMNS = ("model", "architecture", "parameters", "type", "layers", "licence")


class Figures(Value):
    """What a zoo looks like."""

    heatmap: str
    dendrogram: str
    about: str
    groups: tuple[tuple[str, str, str], ...]
    """Cluster, members, why."""


class Findings(Value):
    """What a run found, as far as it got."""

    run: str
    verdict: str = ""
    table: str = ""
    """HTML, escaped."""
    plot: str = ""
    trees: str = ""
    """HTML, escaped."""
    experts: tuple[tuple[str, str, str], ...] = ()
    """Expert, what it is made of, why."""
    left_out: dict[str, str] = {}
    report: bool = False


def plain(text: str) -> str:
    """Return text without control and direction characters, which could make it look like something else."""
    return "".join(one for one in text if one == "\n" or unicodedata.category(one)[0] != "C")


def picture(svg: str) -> str:
    """Return a figure as the address of a picture: nothing in a picture can be run."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def models(desk: Desk) -> list[dict[str, str]]:
    """Return a row for each model of the shelf, from its headers."""
    rows = []
    for name in desk.shelf.models:
        row = dict.fromkeys(COLUMNS, "") | {"model": name}
        try:
            one = desk.shelf.described(name)
        except ZooError as error:
            rows.append({**row, "architecture": plain(str(error))})
            continue
        if one is None:
            rows.append({**row, "architecture": "not downloaded yet"})
            continue
        rows.append(
            {
                "model": name,
                "architecture": plain(one.architecture),
                "parameters": f"{one.parameters:,}",
                "type": one.dtype,
                "layers": str(one.layers),
                "licence": plain(one.licence or "not stated")[:60],
            }
        )
    return rows


def recipe_text(draft: Draft) -> str:
    """Return a draft as YAML; a comment that says what is missing if it is no recipe yet."""
    try:
        return as_yaml(draft)
    except ComposerError as error:
        return "".join(f"# {line}\n" for line in str(error).splitlines())


def zoo_figures(run: Run | None, compared: Compared | None) -> Figures | None:
    """Return the figures of what a run compared, else of what was compared last; None before that."""
    if compared is not None:
        return _of_comparison(compared)
    file = run.path / "similarity.json" if run else None
    return _of_run(file.parent, file.stat().st_mtime_ns) if file and file.is_file() else None


@lru_cache(8)
def _of_run(path: Path, stamp: int) -> Figures:
    from composer.similarity import SimilarityMatrix

    section = Run(path).recipe.cluster
    return _of_comparison(Compared(matrix=SimilarityMatrix.load(path / "similarity.json"), section=section))


def _of_comparison(compared: Compared) -> Figures:
    from composer.clustering import cluster, joins
    from composer.report.figures import dendrogram, heatmap

    matrix, section = compared.matrix, compared.section
    joined = joins(matrix, section)
    return Figures(
        heatmap=picture(heatmap(matrix, joined)),
        dendrogram=picture(dendrogram(matrix, joined, section.threshold)),
        about=f"by {matrix.signal}, threshold {section.threshold:g}",
        groups=tuple((one.id, ", ".join(one.members), plain(one.reason)) for one in cluster(matrix, section)),
    )


def findings(run: Run | None) -> Findings | None:
    """Return what a run found so far; None if that is nothing."""
    files = [run.path / "evidence.json", *sorted(run.path.glob("outcome-*.json"))] if run else []
    found = [file for file in files if file.is_file()]
    if run is None or not found:
        return None
    return _found(run.path, tuple(file.stat().st_mtime_ns for file in found), run.finished)


@lru_cache(8)
def _found(path: Path, stamps: tuple[int, ...], finished: bool) -> Findings:
    from composer.evaluation.evidence import Evidence
    from composer.merging.plan import MergeOutcome
    from composer.mixture.composite import Composite
    from composer.planning import Plan
    from composer.report import evidence_table, merge_trees
    from composer.report.figures import scores_plot

    run = Run(path)
    outcomes = [MergeOutcome.load(file) for file in sorted(path.glob("outcome-*.json"))]
    done = Findings(run=run.name, trees=merge_trees(outcomes, Plan.load(path / "plan.json")))
    if run.composite.exists():
        composite = Composite.open(run.composite.resolve())
        experts = tuple((one.id, ", ".join(one.members), plain(one.reason)) for one in composite.experts)
        done = done.model_copy(update={"experts": experts, "left_out": composite.left_out})
    if (path / "evidence.json").is_file():
        evidence = Evidence.load(path / "evidence.json")
        shown = {"verdict": evidence.verdict, "table": evidence_table(evidence), "plot": picture(scores_plot(evidence))}
        done = done.model_copy(update={**shown, "report": (path / "report.html").is_file()})
    return done
