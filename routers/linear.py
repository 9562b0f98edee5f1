"""Router `linear`: the same linear layer as `prompt`, fitted by ridge logistic regression.

Better than differences of means as soon as there are ten requests per expert, or labelled ones.
"""

import numpy as np
import torch
from torch import Tensor

from routers.gated import GatedKind
from routers.prompt import LinearGates, folded, standardisation

RIDGE = 0.01
"""Inverse strength of the penalty (`C`)."""


class FittedGates(LinearGates):
    """`scores = W x + b`, fitted."""

    learns = True
    quick = False
    grouped = True

    def fit(self, features: Tensor, shares: Tensor, seed: int = 0) -> dict[str, Tensor]:
        """Fit to standardised features, and fold the standardisation in; see `Gates.fit`."""
        from sklearn.linear_model import LogisticRegression

        mean, deviation = standardisation(features)
        standard = (features - mean) / deviation
        # A text that belongs to several experts counts once for each, with its share.
        texts, experts = (shares > 0).nonzero(as_tuple=True)
        model = LogisticRegression(C=RIDGE, max_iter=1000)
        model.fit(standard[texts].numpy(), experts.numpy(), sample_weight=shares[texts, experts].numpy())
        rows, bias = np.zeros((shares.shape[1], features.shape[1])), np.full(shares.shape[1], -np.inf)
        if len(model.classes_) == 2:  # scikit-learn gives one direction for two classes
            rows[model.classes_] = np.stack([-model.coef_[0], model.coef_[0]]) / 2
            bias[model.classes_] = np.array([-model.intercept_[0], model.intercept_[0]]) / 2
        else:
            rows[model.classes_], bias[model.classes_] = model.coef_, model.intercept_
        return folded(torch.from_numpy(rows).float(), mean, deviation, torch.from_numpy(bias).float())


kind = GatedKind("linear", FittedGates())
