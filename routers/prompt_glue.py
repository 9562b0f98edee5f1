"""Router `prompt_glue`: the published recipe to the letter, to compare with.

Model-GLUE (arXiv 2410.05357, section 3.3, and mergekit's `hidden` gates that its code calls): a gate is the mean state
of an expert's prompts at their last token, less that of the prompts that are not for it, scaled to length 1; a request
is the mean over all its tokens, BOS and all; raw states, no bias. On models of up to half a billion parameters it sends
nearly everything to one expert: a few massive dimensions make up nearly all of a state.
"""

import torch
from torch import Tensor

from routers.encoders import Pool
from routers.gated import GatedKind
from routers.prompt import LinearGates, differences


class GlueGates(LinearGates):
    """`scores = W x`."""

    pool: Pool = "last"
    bos = True
    grouped = False

    def fit(self, features: Tensor, shares: Tensor, seed: int = 0) -> dict[str, Tensor]:
        """Return the differences of means, scaled to length 1; see `Gates.fit`."""
        width = features.shape[1]
        rows = differences(features, shares)
        return {"weight": rows, "bias": torch.zeros(len(rows)), "deviation": torch.ones(width)}


kind = GatedKind("prompt_glue", GlueGates())
