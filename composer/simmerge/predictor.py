"""The predictor: what a merge would score on a task, and how sure that is, without making it.

LightGBM regression on `features.py`, with intervals from cross-validated residuals: the residuals of models that were
never trained on, each divided by a predicted scale (normalised conformal prediction; Papadopoulos and others 2008).
"""

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from composer.artefacts import digest
from composer.errors import PredictorError, disk_errors, first_line
from composer.simmerge.features import FEATURES, NAMES, VERSION
from composer.value import Value

if TYPE_CHECKING:
    from composer.simmerge.signals import Array

SHIPPED = Path(__file__).parent / "models" / f"v{VERSION}.json.gz"
"""The predictor that comes with the program."""
LEAST_SCALE = 0.005
"""Smallest scale of a prediction's error, in score."""


@dataclass(frozen=True)
class Prediction:
    """What merges would score on some tasks."""

    gain: "Array"
    """`[merges, tasks]`: over the strongest source of each task."""
    scale: "Array"
    """`[merges, tasks]`: of the error, before calibration."""


class Predictor(Value):
    """A trained predictor; see `composer.simmerge.training.train`."""

    version: int = VERSION
    """Of the features."""
    names: tuple[str, ...]
    """Features, in order."""
    gain_model: str
    """LightGBM's text."""
    scale_model: str
    """LightGBM's text; predicts the log of the absolute error."""
    errors: tuple[float, ...]
    """Quantiles of cross-validated errors over their scale, at equal steps from 0 to 1: of one task."""
    mean_errors: tuple[float, ...]
    """The same of the mean over tasks, of what is promised over the best single model: known scores are noisy too."""
    correlation: float
    """Of the errors of one merge on two tasks."""
    low: tuple[float, ...]
    """The first percentile of each feature in training."""
    high: tuple[float, ...]
    """The last percentile."""
    importance: tuple[float, ...]
    """Share of the gain model's loss reduction that each feature brings."""
    card: dict[str, Any]
    """What it was trained on, and how good it is."""

    @classmethod
    def unpack(cls, path: Path = SHIPPED) -> "Predictor":
        """Read a predictor.

        Raises:
            PredictorError: if there is none, or it knows other features than this program.
        """
        if path == SHIPPED and not path.is_file():
            raise PredictorError(
                "this version comes without a predictor; train one ('model-composer simmerge collect' and 'train') and "
                "name it as merge.simmerge.predictor"
            )
        try:
            found = cls.model_validate_json(gzip.decompress(path.read_bytes()))
        except (OSError, EOFError, ValueError) as error:
            raise PredictorError(f"{path} is no predictor: {first_line(error)}") from error
        if found.version != VERSION or found.names != NAMES:
            raise PredictorError(
                f"{path} predicts from features of version {found.version}, this program knows {VERSION}; "
                "train another with 'model-composer simmerge train CORPUS --out FILE'"
            )
        return found

    def pack(self, path: Path) -> Path:
        """Write it, all or nothing.

        Raises:
            DiskFullError: if there is no room.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with disk_errors(path):
            partial.write_bytes(gzip.compress(self.model_dump_json().encode(), mtime=0))
            partial.replace(path)
        return path

    @property
    def key(self) -> str:
        """Hash of all that its predictions depend on."""
        return digest([self.gain_model, self.scale_model, self.errors, self.mean_errors, self.correlation])

    def predict(self, features: Sequence["Array"]) -> Prediction:
        """Predict merges on tasks.

        Args:
            features: `[merges, features]` for each task, from `merge_features`.
        """
        count = len(features[0])
        rows = np.concatenate(features)
        gain = np.asarray(self._gain.predict(rows)).reshape(len(features), count).T
        scale = np.exp(np.asarray(self._scale.predict(rows))).reshape(len(features), count).T
        return Prediction(gain, np.maximum(scale, LEAST_SCALE))

    def mean_interval(self, prediction: Prediction, level: float) -> tuple["Array", "Array", "Array"]:
        """Return the mean gain over tasks with lower and upper bound, each `[merges]`.

        Errors of one merge on several tasks go together: the scale of their mean is that of correlated errors.

        Args:
            prediction: From `predict`.
            level: Share of merges that lie within, 0..1.
        """
        return self._interval(prediction.gain.mean(axis=1), self.mean_scale(prediction), self.mean_errors, level)

    def chance(self, gain: "Array", prediction: Prediction) -> "Array":
        """Return the probability that the mean over tasks exceeds what `gain`, `[merges]`, is measured from."""
        steps = np.linspace(0, 1, len(self.mean_errors))
        found: Array = 1 - np.interp(-gain / self.mean_scale(prediction), self.mean_errors, steps)
        return found

    def interval(self, prediction: Prediction, level: float) -> tuple["Array", "Array", "Array"]:
        """Return gain on each task with lower and upper bound, each `[merges, tasks]`."""
        return self._interval(prediction.gain, prediction.scale, self.errors, level)

    def mean_scale(self, prediction: Prediction) -> "Array":
        """Return the scale of the error of the mean over tasks, `[merges]`."""
        return mean_scale(prediction.scale, self.correlation)

    def novelty(self, features: "Array") -> "Array":
        """Return how far merges are from what was trained on, 0..1: features out of range, weighted by importance.

        Args:
            features: `[merges, features]`.
        """
        with np.errstate(invalid="ignore"):
            outside = (features < np.array(self.low)) | (features > np.array(self.high))
        found: Array = outside @ np.array(self.importance)
        return found

    def reasons(self, features: "Array") -> "Array":
        """Return what each feature adds to a prediction (TreeSHAP; Lundberg and others 2020), `[merges, features]`."""
        found: Array = np.asarray(self._gain.predict(features, pred_contrib=True))[:, :-1]
        return found

    def _interval(
        self, middle: "Array", scale: "Array", quantiles: tuple[float, ...], level: float
    ) -> tuple["Array", "Array", "Array"]:
        steps = np.linspace(0, 1, len(quantiles))
        low, high = (np.interp(place, steps, quantiles) for place in ((1 - level) / 2, (1 + level) / 2))
        return middle, middle + low * scale, middle + high * scale

    @cached_property
    def _gain(self) -> Any:
        return _booster(self.gain_model)

    @cached_property
    def _scale(self) -> Any:
        return _booster(self.scale_model)


def mean_scale(scale: "Array", correlation: float) -> "Array":
    """Return the scale of the mean of correlated errors, `[merges]`, from their own, `[merges, tasks]`."""
    tasks = scale.shape[1]
    found: Array = np.sqrt((scale**2).mean(axis=1) * (correlation + (1 - correlation) / tasks))
    return found


@lru_cache(maxsize=8)
def _booster(text: str) -> Any:
    import lightgbm

    return lightgbm.Booster(model_str=text)


def in_words(name: str) -> str:
    """Return what a feature is, for people."""
    feature = FEATURES[name]
    return f"{feature.summary} ({feature.unit})"
