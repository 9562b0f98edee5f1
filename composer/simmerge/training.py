"""Training the predictor, with nothing judged on models it was trained on."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, Any

import numpy as np

from composer.errors import PredictorError
from composer.simmerge.corpus import SINGLE, matrix
from composer.simmerge.features import NAMES
from composer.simmerge.predictor import LEAST_SCALE, Predictor

if TYPE_CHECKING:
    import pandas
    from numpy.typing import NDArray

    from composer.simmerge.signals import Array

FEWEST = 200
"""Rows of merges that a corpus must have."""
FOLDS = 5
"""Groups of models; each pair of groups is left out once."""
TREES, SCALE_TREES = 300, 80
QUANTILES = 201
OF_GAIN: dict[str, Any] = {"objective": "huber", "alpha": 0.1}
"""Broken models lose more than anything else in a corpus; squares of such errors would be all that is learnt from."""
OF_SCALE: dict[str, Any] = {"objective": "regression"}
SETTINGS: dict[str, Any] = {
    "learning_rate": 0.04,
    "num_leaves": 15,
    "min_data_in_leaf": 40,
    "feature_fraction": 0.5,
    "bagging_fraction": 0.7,
    "bagging_freq": 1,
    "lambda_l2": 5.0,
    "verbosity": -1,
    "seed": 0,
    "deterministic": True,
    "force_row_wise": True,
}
ABSOLUTE = (
    "sure_origin", "sure_strong", "sure_others", "sure_merged", "sure_merged_curved", "entropy_strong",
    "entropy_others", "drift_strong", "drift_others", "drift_merged", "task_drift_strong", "task_drift_others",
    "task_drift_merged", "focus_strong", "focus_others", "score_strong", "length",
)  # fmt: skip
"""Features that tell how large and how good the models are. A predictor does not go by them: it would learn that models
as small as those it was trained on lose, and say so of others."""
RISING = ("imagined", "imagined_curved", "imagined_hard", "imagined_hard_curved")
"""Features that a prediction never falls with."""


def merges_of(table: "pandas.DataFrame") -> "pandas.DataFrame":
    """Return the rows of a corpus that are merges, with `gain`: the score less that of the strongest source.

    Raises:
        PredictorError: if there are too few to train on.
    """
    found = table[table["arm"] != SINGLE].reset_index(drop=True)
    if len(found) < FEWEST:
        raise PredictorError(
            f"the corpus has {len(found)} rows of merges, and it takes {FEWEST} to train on; "
            "collect more with 'model-composer simmerge collect'"
        )
    strong = [scores[place] for scores, place in zip(found["source_scores"], found["strong"], strict=True)]
    return found.assign(gain=found["score"] - np.array(strong))


def train(table: "pandas.DataFrame", *, trees: int = TREES, threads: int = 0) -> Predictor:
    """Train a predictor on a corpus.

    Args:
        table: From `load_corpus`.
        trees: Of the model of gains.
        threads: That LightGBM uses; 0 for all.

    Raises:
        PredictorError: if the corpus is too small.
    """
    rows = merges_of(table)
    features, gain = matrix(rows), rows["gain"].to_numpy(dtype=np.float64)
    outside = cross_validate(rows, trees=trees, threads=threads)
    residual = gain - outside
    known = np.isfinite(residual)
    target = _size(residual)
    scale = cross_validate_scale(rows, residual, threads=threads)
    calibrated = known & np.isfinite(scale)
    standard = residual[calibrated] / scale[calibrated]
    correlation = _correlation(rows[calibrated], residual[calibrated], scale[calibrated])
    kept = promises_of(rows[calibrated], outside[calibrated], scale[calibrated], correlation)
    model = _fit(features, gain, trees, threads, OF_GAIN)
    weights = model.feature_importance("gain")
    return Predictor(
        names=NAMES,
        gain_model=model.model_to_string(),
        scale_model=_fit(features[known], target[known], SCALE_TREES, threads, OF_SCALE).model_to_string(),
        errors=_quantiles(standard),
        mean_errors=_quantiles((kept.real - kept.promised) / kept.scale),
        correlation=correlation,
        low=tuple(_percentiles(features, 1)),
        high=tuple(_percentiles(features, 99)),
        importance=tuple(float(one) for one in weights / max(weights.sum(), 1e-12)),
        card=_card(rows, residual[known]),
    )


def cross_validate(
    rows: "pandas.DataFrame", *, only: "NDArray[np.bool_] | None" = None, trees: int = TREES, threads: int = 0
) -> "Array":
    """Return the gain that is predicted for each row by a model that saw none of its sources.

    Args:
        rows: From `merges_of`.
        only: Which rows are learnt from, `[rows]`; by default all.
        trees: Of each model.
        threads: That LightGBM uses; 0 for all.

    Returns:
        `[rows]`; nan for a merge of more than two groups: leaving all of them out leaves little.
    """
    features, gain = matrix(rows), rows["gain"].to_numpy(dtype=np.float64)
    found: Array = np.full(len(rows), np.nan)
    for others, test in _folds(rows):
        learn = others if only is None else others & only
        found[test] = _fit(features[learn], gain[learn], trees, threads, OF_GAIN).predict(features[test])
    return found


def cross_validate_scale(rows: "pandas.DataFrame", residual: "Array", *, threads: int = 0) -> "Array":
    """Return the scale of each row's error as predicted by a model that saw none of its sources.

    Args:
        rows: From `merges_of`.
        residual: Cross-validated errors, `[rows]`; nan where there is none.
        threads: That LightGBM uses; 0 for all.

    Returns:
        `[rows]`, before calibration; nan as in `cross_validate`.
    """
    features, target, known = matrix(rows), _size(residual), np.isfinite(residual)
    found: Array = np.full(len(rows), np.nan)
    for learn, test in _folds(rows):
        model = _fit(features[learn & known], target[learn & known], SCALE_TREES, threads, OF_SCALE)
        found[test] = np.maximum(np.exp(model.predict(features[test])), LEAST_SCALE)
    return found


def _size(residual: "Array") -> "Array":
    """Return what the model of scales predicts: the log of absolute errors."""
    found: Array = np.log(np.maximum(np.abs(residual), LEAST_SCALE))
    return found


def _folds(rows: "pandas.DataFrame") -> "Iterator[tuple[NDArray[np.bool_], NDArray[np.bool_]]]":
    """Yield which rows are learnt and which are tested, for every pair of groups of models.

    Models of one name belong to one group, whatever the seed and the base: they learnt from the same data.
    """
    names = sorted({name for sources in rows["sources"] for name in sources})
    order = np.random.default_rng(0).permutation(len(names))
    group = {names[place]: number % FOLDS for number, place in enumerate(order)}
    groups = [frozenset(group[name] for name in sources) for sources in rows["sources"]]
    for first, second in combinations_with_replacement(range(FOLDS), 2):
        both = frozenset((first, second))
        test = np.array([one == both for one in groups])
        learn = np.array([not one & both for one in groups])
        if test.any() and learn.sum() >= FEWEST // 2:
            yield learn, test


def _fit(features: "Array", target: "Array", trees: int, threads: int, objective: dict[str, Any]) -> Any:
    import lightgbm

    settings = {**SETTINGS, **objective, "num_threads": threads}
    settings["feature_contri"] = [float(name not in ABSOLUTE) for name in NAMES]
    settings["monotone_constraints"] = [int(name in RISING) for name in NAMES]
    data = lightgbm.Dataset(features, target, feature_name=list(NAMES))
    return lightgbm.train(settings, data, num_boost_round=trees)


@dataclass(frozen=True)
class Promises:
    """What is promised of merges, as a planner does it from known scores, and what came of it; all `[merges]`."""

    promised: "Array"
    """Predicted gain over the best single source, mean over tasks."""
    real: "Array"
    """The same as measured."""
    scale: "Array"
    """Of the error, before calibration."""


def promises_of(rows: "pandas.DataFrame", gain: "Array", scale: "Array", correlation: float) -> Promises:
    """Return what is promised of each merge of which labels of proxy items are known.

    Args:
        rows: From `merges_of`.
        gain: Predicted for each row over its strongest source.
        scale: Of each row's error.
        correlation: Of the errors of one merge on two tasks.
    """
    known = [scores[place] for scores, place in zip(rows["known_scores"], rows["strong"], strict=True)]
    order = rows["hashes"].map(tuple)
    table = rows.assign(expected=np.array(known) + gain, variance=scale**2, order=order)[rows["labelled"]]
    merges = table.groupby(["zoo", "order", "arm", "seed"], sort=True)
    means = merges[["score", "expected", "variance"]].mean()
    best = {
        name: merges[name].agg(lambda lists: np.mean(np.stack(lists.to_list()), axis=0).max()).to_numpy()
        for name in ("source_scores", "known_scores")
    }
    tasks = merges.size().to_numpy()
    wide = np.sqrt(means["variance"].to_numpy() * (correlation + (1 - correlation) / tasks))
    return Promises(
        promised=means["expected"].to_numpy() - best["known_scores"],
        real=means["score"].to_numpy() - best["source_scores"],
        scale=wide,
    )


def _correlation(rows: "pandas.DataFrame", residual: "Array", scale: "Array") -> float:
    """Return how the errors of one merge on two tasks go together."""
    keys = rows["hashes"].map(tuple).astype(str) + rows["arm"] + rows["labelled"].astype(str)
    order: dict[str, list[int]] = {}
    for place, key in enumerate(keys):
        order.setdefault(key, []).append(place)
    standard = residual / scale
    products, squares = [], []
    for places in order.values():
        own = standard[places]
        if len(own) > 1:
            products.append((own.sum() ** 2 - (own**2).sum()) / (len(own) * (len(own) - 1)))
            squares.append((own**2).mean())
    return float(np.clip(np.mean(products) / np.mean(squares), 0.0, 1.0)) if products else 1.0


def _quantiles(values: "Array") -> tuple[float, ...]:
    return tuple(float(one) for one in np.quantile(values, np.linspace(0, 1, QUANTILES)))


def _percentiles(features: "Array", place: float) -> "Iterator[float]":
    for column in features.T:
        known = column[np.isfinite(column)]
        yield float(np.percentile(known, place)) if len(known) else 0.0


def _card(rows: "pandas.DataFrame", residual: "Array") -> dict[str, Any]:
    merges = rows[["zoo", "arm"]].assign(key=rows["hashes"].map(tuple).astype(str)).drop_duplicates()
    gain = rows["gain"].to_numpy()
    return {
        "rows": len(rows),
        "merges": len(merges),
        "zoos": {
            str(zoo): {"models": len({name for one in part["sources"] for name in one}), "rows": len(part)}
            for zoo, part in rows.groupby("zoo")
        },
        "arms": sorted(rows["arm"].unique().tolist()),
        "tasks": sorted(rows["task"].unique().tolist()),
        "missing": {name: float(share) for name, share in zip(NAMES, np.isnan(matrix(rows)).mean(axis=0), strict=True)},
        "cross_validated": {
            "mean_absolute_error": float(np.abs(residual).mean()),
            "of_no_prediction": float(np.abs(gain - np.median(gain)).mean()),
            "explained_variance": float(1 - residual.var() / gain.var()),
        },
    }
