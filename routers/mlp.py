"""Router `mlp`: two layers with ReLU between them, of which only the router learns (Model-GLUE, section 3.3)."""

import torch
from torch import Tensor, nn

from routers.encoders import Pool
from routers.gated import GatedKind
from routers.prompt import standardisation

WIDTH = 64
STEPS = 300
RATE = 1e-2
DECAY = 0.1
DROP = 0.2


class MLPGates:
    """`scores = W2 relu(W1 x + b1) + b2`, the standardisation folded into W1 and b1."""

    pool: Pool = "mean"
    bos = False
    learns = True
    quick = False
    grouped = True

    def fit(self, features: Tensor, shares: Tensor, seed: int = 0) -> dict[str, Tensor]:
        """Minimise the cross-entropy with the shares by AdamW; see `Gates.fit`."""
        mean, deviation = standardisation(features)
        standard = ((features - mean) / deviation).clone()
        # What draws at random here must not change what others draw.
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
            torch.manual_seed(seed)
            standard, wanted = standard.clone(), shares.clone()
            hidden, out = nn.Linear(features.shape[1], WIDTH), nn.Linear(WIDTH, shares.shape[1])
            layers = nn.Sequential(nn.Dropout(DROP), hidden, nn.ReLU(), out).train()
            optimiser = torch.optim.AdamW(layers.parameters(), lr=RATE, weight_decay=DECAY)
            for _ in range(STEPS):
                optimiser.zero_grad()
                loss = nn.functional.cross_entropy(layers(standard), wanted)
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
        first = hidden.weight.detach() / deviation
        return {
            "weight_1": first,
            "bias_1": hidden.bias.detach() - first @ mean,
            "weight_2": out.weight.detach().clone(),
            "bias_2": out.bias.detach().clone(),
        }

    def score(self, weights: dict[str, Tensor], features: Tensor) -> Tensor:
        """Return the scores of each text; see `Gates.score`."""
        hidden = (features @ weights["weight_1"].T + weights["bias_1"]).relu()
        return hidden @ weights["weight_2"].T + weights["bias_2"]

    def directions(self, weights: dict[str, Tensor]) -> Tensor | None:
        """Return None: there are none."""
        return None


kind = GatedKind("mlp", MLPGates())
