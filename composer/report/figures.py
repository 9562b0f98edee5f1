"""Figures of the report, as SVG text that stands alone."""

import io
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from composer.clustering import Join
from composer.evaluation import Evidence
from composer.similarity import SimilarityMatrix

mpl.rcParams["svg.hashsalt"] = "model-composer"  # the same report for the same run
mpl.rcParams["font.size"] = 9
mpl.rcParams["svg.fonttype"] = "none"

INK, COMPOSITE, OTHER, REFERENCE = "#1f2933", "#0b7285", "#adb5bd", "#e9ecef"


CLOSEST = 1e-7
"""Distances below this are drawn here: identical models have none, and a logarithm needs one."""


def heatmap(matrix: SimilarityMatrix, joined: Sequence[Join] = ()) -> str:
    """Draw all similarities, in the dendrogram's order; grey with a cross where two models cannot be compared.

    Fine-tunes of one base differ in the fifth decimal and families in the first, so where that is so the colours
    follow the logarithm of the distance, 1 - similarity.
    """
    order = leaf_order(len(matrix.ids), joined)
    names = [matrix.ids[place] for place in order]
    rows = [[matrix.values[a][b] for b in order] for a in order]
    values = np.array([[np.nan if v is None else v for v in row] for row in rows], dtype=float)
    count = len(names)
    off = values[~np.eye(count, dtype=bool)]
    finite = off[np.isfinite(off)]
    figure = Figure(figsize=(2.6 + 0.62 * count, 1.6 + 0.5 * count))
    axes = figure.subplots()
    if finite.size and finite.max() > 0.999:
        shown = np.log10(np.clip(1 - values, CLOSEST, None))
        np.fill_diagonal(shown, np.log10(CLOSEST))
        image = axes.imshow(shown, cmap="GnBu_r", vmin=np.log10(CLOSEST), vmax=0.0)
        bar = figure.colorbar(image, ax=axes, shrink=0.8, label=f"1 - {matrix.signal}")
        bar.set_ticks(range(-7, 1), labels=[f"1e{power}" for power in range(-7, 0)] + ["1"])
        dark = shown < np.log10(CLOSEST) / 2
    else:
        low = min(0.0, float(finite.min())) if finite.size else 0.0
        image = axes.imshow(values, cmap="GnBu", vmin=low, vmax=1.0)
        figure.colorbar(image, ax=axes, shrink=0.8, label=matrix.signal)
        dark = values > (low + 1.0) / 2
    axes.set_facecolor("#eceff1")
    axes.set_xticks(range(count), names, rotation=45, ha="right")
    axes.set_yticks(range(count), names)
    for row in range(count):
        for column in range(count):
            value = values[row, column]
            text = "×" if np.isnan(value) else ("1" if row == column else _number(value))
            colour = "white" if np.isfinite(value) and dark[row, column] else INK
            axes.text(column, row, text, ha="center", va="center", fontsize=7 if count <= 20 else 5, color=colour)
    return _svg(figure, "Similarity of all pairs of models")


def dendrogram(matrix: SimilarityMatrix, joined: Sequence[Join], threshold: float) -> str:
    """Draw how groups join as the threshold falls; groups that never meet stay apart."""
    order = leaf_order(len(matrix.ids), joined)
    count = len(order)
    place: dict[tuple[int, ...], tuple[float, float]] = {(leaf,): (float(row), 0.0) for row, leaf in enumerate(order)}
    logarithmic = any(join.similarity > 0.999 for join in joined)
    floor = CLOSEST if logarithmic else 0.0
    figure = Figure(figsize=(7.4, 1.2 + 0.34 * count))
    axes = figure.subplots()
    for join in joined:
        (first, start), (second, other) = place.pop(join.first), place.pop(join.second)
        distance = max(1 - join.similarity, floor)
        colour = COMPOSITE if join.similarity >= threshold else OTHER
        axes.plot([start, distance, distance, other], [first, first, second, second], color=colour, linewidth=1.4)
        place[join.first + join.second] = ((first + second) / 2, distance)
    limit = max([1 - join.similarity for join in joined] + [1 - threshold, floor]) * (3 if logarithmic else 1.1)
    for row, distance in place.values():
        axes.plot([distance, limit], [row, row], color=OTHER, linewidth=0.8, linestyle=":")
    if 1 - threshold > floor:
        axes.axvline(1 - threshold, color="#b02a37", linewidth=0.9, linestyle="--")
        axes.text(1 - threshold, -0.9, f"threshold {threshold:.6g} ", color="#b02a37", fontsize=8, ha="right")
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(floor / 2, limit)
    else:
        axes.set_xlim(0, limit)
    axes.set_yticks(range(count), [matrix.ids[leaf] for leaf in order])
    axes.set_ylim(count - 0.5, -1.4)
    axes.set_xlabel(f"1 - {matrix.signal}")
    return _svg(figure, "Dendrogram")


def leaf_order(count: int, joined: Sequence[Join]) -> list[int]:
    """Return the places of models in the order in which the dendrogram has no crossing lines."""
    groups: dict[tuple[int, ...], None] = {(place,): None for place in range(count)}
    for join in joined:
        del groups[join.first], groups[join.second]
        groups[join.first + join.second] = None
    return [place for group in sorted(groups, key=lambda group: (-len(group), group)) for place in group]


def _number(value: float) -> str:
    """Return a similarity in few characters; what is close to 1 by its distance from it."""
    if value > 0.9995:
        return f"1-{1 - value:.0e}".replace("e-0", "e-")
    return f"{value:.3f}".replace("0.", ".", 1)


def scores_plot(evidence: Evidence) -> str:
    """Draw each subject's mean score and its difference from the composite with the paired interval."""
    rows = list(evidence.subjects)
    figure = Figure(figsize=(8.2, 0.9 + 0.33 * len(rows)))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1, 1])
    names = [subject.scores.subject for subject in rows]
    colours = [COMPOSITE if one.role == "composite" else OTHER if one.real else REFERENCE for one in rows]
    edges = ["none" if one.real else OTHER for one in rows]
    left.barh(names, [subject.scores.mean for subject in rows], color=colours, edgecolor=edges)
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
    right.set_xlabel("composite minus this (95 % paired interval)")
    return _svg(figure, "Scores of the composite and its sources")


def _svg(figure: Figure, title: str) -> str:
    for axes in figure.axes:
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Title": title})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
