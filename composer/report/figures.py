"""Figures of the report, as SVG text that stands alone."""

import io

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from composer.evaluation import Evidence
from composer.similarity import SimilarityMatrix

mpl.rcParams["svg.hashsalt"] = "model-composer"  # the same report for the same run
mpl.rcParams["font.size"] = 9
mpl.rcParams["svg.fonttype"] = "none"

INK, COMPOSITE, OTHER = "#1f2933", "#0b7285", "#adb5bd"


def heatmap(matrix: SimilarityMatrix) -> str:
    """Draw all similarities; grey with a cross where two models cannot be compared.

    Fine-tunes of one base differ in the fourth decimal, so the colours span what is off the diagonal.
    """
    count = len(matrix.ids)
    values = np.array([[np.nan if v is None else v for v in row] for row in matrix.values], dtype=float)
    off = values[~np.eye(count, dtype=bool)]
    finite = off[np.isfinite(off)]
    low = float(finite.min()) if finite.size else 0.0
    figure = Figure(figsize=(2.6 + 0.62 * count, 1.6 + 0.5 * count))
    axes = figure.subplots()
    image = axes.imshow(values, cmap="GnBu", vmin=min(low, 0.9999), vmax=1.0)
    axes.set_facecolor("#eceff1")
    axes.set_xticks(range(count), matrix.ids, rotation=45, ha="right")
    axes.set_yticks(range(count), matrix.ids)
    middle = (min(low, 0.9999) + 1.0) / 2
    for row in range(count):
        for column in range(count):
            value = values[row, column]
            text = "×" if np.isnan(value) else ("1" if row == column else f"{value:.4f}".lstrip("0"))
            colour = "white" if np.isfinite(value) and value > middle else INK
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, ax=axes, shrink=0.8, label="cosine of weights")
    return _svg(figure, "Similarity of all pairs of models")


def scores_plot(evidence: Evidence) -> str:
    """Draw each subject's mean score and its difference from the composite with the paired interval."""
    rows = list(evidence.subjects)
    figure = Figure(figsize=(8.2, 0.9 + 0.33 * len(rows)))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1, 1])
    names = [subject.scores.subject for subject in rows]
    colours = [COMPOSITE if subject.role == "composite" else OTHER for subject in rows]
    left.barh(names, [subject.scores.mean for subject in rows], color=colours)
    left.set_xlabel("mean over tasks, held-out items")
    left.invert_yaxis()
    gaps = {one.other: one for one in evidence.differences}
    for place, subject in enumerate(rows):
        gap = gaps.get(subject.scores.subject)
        if gap is not None:
            right.errorbar(
                gap.mean,
                place,
                xerr=[[gap.mean - gap.low], [gap.high - gap.mean]],
                fmt="o",
                color=COMPOSITE,
                capsize=3,
                markersize=4,
            )
    right.axvline(0, color=INK, linewidth=0.8)
    right.set_xlabel("composite minus this model (95 % paired interval)")
    return _svg(figure, "Scores of the composite and its sources")


def _svg(figure: Figure, title: str) -> str:
    for axes in figure.axes:
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Title": title})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
