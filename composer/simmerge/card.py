"""The predictor's card: what it was trained on, how good it is, and when not to trust it."""

from composer.simmerge.advisor import STRANGE
from composer.simmerge.features import FEATURES
from composer.simmerge.predictor import Predictor

SHOWN = 12
"""Features that the card names."""


def card(predictor: Predictor) -> str:
    """Return the card in Markdown."""
    told = predictor.card
    judged = told["cross_validated"]
    lines = [
        f"# SimMerge predictor, features version {predictor.version}",
        "",
        "Predicts what a merge scores on a task, less the score of its strongest source there, without making it.",
        "",
        "## Trained on",
        "",
        f"{told['merges']} merges, {told['rows']} rows (each merge on each task, with and without labels), of",
        "",
        "| zoo | models | rows |",
        "|---|---|---|",
        *(f"| {name} | {zoo['models']} | {zoo['rows']} |" for name, zoo in told["zoos"].items()),
        "",
        f"Tasks: {', '.join(told['tasks'])}.",
        "",
        f"Ways of merging: {'; '.join(told['arms'])}.",
        "",
        "## How good it is",
        "",
        "Cross-validated by model: no model of a merge that is judged was in training, under any seed.",
        "",
        "| | |",
        "|---|---|",
        f"| mean absolute error of the gain on one task | {judged['mean_absolute_error']:.4f} |",
        f"| the same of predicting the median for all | {judged['of_no_prediction']:.4f} |",
        f"| variance explained (scores are of few items: a part is noise) | {judged['explained_variance']:.2f} |",
        f"| correlation of the errors of a merge on two tasks | {predictor.correlation:.2f} |",
        "",
        "## What it goes by",
        "",
        "| feature | share | |",
        "|---|---|---|",
    ]
    ranked = sorted(zip(predictor.importance, predictor.names, strict=True), reverse=True)[:SHOWN]
    lines += [f"| `{name}` | {share:.1%} | {FEATURES[name].summary} |" for share, name in ranked]
    missing = {name: share for name, share in told["missing"].items() if share > 0}
    if missing:
        most = sorted(missing.items(), key=lambda one: -one[1])[:6]
        listed = ", ".join(f"`{name}` {share:.0%}" for name, share in most)
        lines += ["", f"Not known in a part of the rows (LightGBM takes that as it is): {listed} …"]
    lines += [
        "",
        "## When not to trust it",
        "",
        f"- Where `novelty` is above {STRANGE:g}, the share of what it goes by that lies outside the range it was",
        "  trained on: there it ranks merges, but how often they gain at all, and so its intervals, need not hold.",
        "- For models without a common base: it was trained on fine-tunes of one.",
        "- For merges of many: it was trained on pairs, and on few merges of three and four.",
        "- For tasks with a handful of proxy items: what single models score there is noise.",
    ]
    return "\n".join(lines)


def feature_table() -> str:
    """Return all features with unit and group in Markdown."""
    lines = ["| feature | group | unit | what it is |", "|---|---|---|---|"]
    lines += [f"| `{name}` | {one.group} | {one.unit} | {one.summary} |" for name, one in FEATURES.items()]
    return "\n".join(lines)
