"""Router `prompt`: one linear layer, initialised from example requests, without training.

After Model-GLUE's prompt vectors (arXiv 2410.05357, section 3.3), with the two changes without which they do
not route: per-dimension standardisation, since a few massive dimensions drown all others, and whole requests
instead of keywords. Features are means over the text's tokens at an early layer; a gate is the direction from the mean
of all other examples to the mean of its own. An expert has one, or, if it was merged from several models, one for the
examples of each: the mean of sums and film reviews is the middle of nowhere.
"""

from torch import Tensor

from routers.encoders import Pool
from routers.gated import GatedKind


class LinearGates:
    """`scores = W x + b`, the standardisation folded in."""

    pool: Pool = "mean"
    bos = False
    learns = False
    quick = True
    grouped = True

    def fit(self, features: Tensor, shares: Tensor, seed: int = 0) -> dict[str, Tensor]:
        """Fold standardisation and one-vs-rest mean differences into one linear layer; see `Gates.fit`."""
        mean, deviation = standardisation(features)
        standard = (features - mean) / deviation
        return folded(differences(standard, shares), mean, deviation)

    def score(self, weights: dict[str, Tensor], features: Tensor) -> Tensor:
        """Return `W x + b` of each text; see `Gates.score`."""
        return features @ weights["weight"].T + weights["bias"]

    def directions(self, weights: dict[str, Tensor]) -> Tensor | None:
        """Return the rows of W as they stand before the standardisation; see `Gates.directions`."""
        return weights["weight"] * weights["deviation"]


def differences(features: Tensor, shares: Tensor) -> Tensor:
    """Return the mean of each expert's own texts less that of all others, scaled to length 1, `[experts, width]`."""
    own = shares / shares.sum(dim=0).clamp_min(1e-12)
    rest = (1 - shares) / (1 - shares).sum(dim=0).clamp_min(1e-12)
    rows = (own - rest).T @ features
    scaled: Tensor = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return scaled


def standardisation(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of each dimension, both `[width]`; a constant dimension does no harm."""
    mean, deviation = features.mean(dim=0), features.std(dim=0, correction=0)
    return mean, deviation.clamp_min(1e-6 * float(deviation.max()) + 1e-12)


def folded(rows: Tensor, mean: Tensor, deviation: Tensor, bias: Tensor | float = 0.0) -> dict[str, Tensor]:
    """Return the layer that does for raw features what `rows` and `bias` do for standardised ones."""
    weight = rows / deviation
    return {"weight": weight, "bias": bias - weight @ mean, "deviation": deviation}


gates = LinearGates()
kind = GatedKind("prompt", gates)
