"""Router `prompt`: one linear layer, initialised from example requests, without training.

After Model-GLUE's prompt vectors (arXiv 2410.05357, section 3.3), with the two changes without which they do
not route: per-dimension standardisation, since a few massive dimensions drown all others, and whole requests
instead of keywords. Features are means over the text's tokens at an early layer; the gate of an expert is the
direction from the mean of all other experts' examples to the mean of its own.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from routers import Candidate, Decision, Router, RouterManifest
from routers.encoder import Encoder, features_by_layer

WEIGHTS = "router.safetensors"
HEALTHY = 0.7
"""Below this leave-one-out accuracy a router is reported as doubtful."""


@dataclass
class PromptRouter:
    """`scores = W x + b` over the encoder's feature of the text."""

    manifest: RouterManifest
    encoder: Encoder
    weight: Tensor
    """`[experts, hidden]`."""
    bias: Tensor
    """`[experts]`."""

    def route(self, text: str) -> Decision:
        """Return the expert for one text; the fallback if the two best scores are too close."""
        scores = self.weight @ self.encoder(text) + self.bias
        order = scores.argsort(descending=True)
        margin = float(scores[order[0]] - scores[order[1]])
        abstained = margin < self.manifest.margin
        best = self.manifest.experts[int(order[0])]
        return Decision(
            expert=self.manifest.fallback if abstained else best,
            scores=dict(zip(self.manifest.experts, scores.tolist(), strict=True)),
            margin=margin,
            abstained=abstained,
        )


def gates(features: Tensor, labels: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Fold standardisation and one-vs-rest mean differences into one linear layer.

    Args:
        features: `[examples, hidden]`.
        labels: `[examples]`, the expert each example is meant for.
        experts: Number of experts; each has at least one example.

    Returns:
        W `[experts, hidden]` and b `[experts]`.
    """
    mean, deviation = features.mean(dim=0), features.std(dim=0, correction=0)
    deviation = deviation.clamp_min(1e-6 * float(deviation.max()) + 1e-12)
    standard = (features - mean) / deviation
    rows = []
    for expert in range(experts):
        own = labels == expert
        row = standard[own].mean(dim=0) - standard[~own].mean(dim=0)
        rows.append(row / row.norm().clamp_min(1e-12))
    weight = torch.stack(rows) / deviation
    return weight, -(weight @ mean)


def leave_one_out(features: Tensor, labels: Tensor, experts: int) -> list[tuple[int, int]]:
    """Return (own expert, chosen expert) of each example, by gates made without it.

    Examples that are their expert's only one cannot be left out and are passed over.
    """
    pairs = []
    for index in range(len(labels)):
        keep = torch.arange(len(labels)) != index
        own = int(labels[index])
        if not bool((labels[keep] == own).any()):
            continue
        weight, bias = gates(features[keep], labels[keep], experts)
        pairs.append((own, int((weight @ features[index] + bias).argmax())))
    return pairs


class PromptRouterKind:
    """Builds and loads `PromptRouter`s."""

    def build(
        self,
        candidates: list[Candidate],
        directory: Path,
        *,
        encoder: str,
        layer: int | str,
        margin: float,
        fallback: str,
    ) -> RouterManifest:
        """Choose encoder and layer by leave-one-out, and write the gates into `directory`.

        Ties go to the cheaper encoder: fewer layers first, then the smaller model.
        """
        texts = [text for candidate in candidates for text in candidate.examples]
        labels = torch.tensor([i for i, candidate in enumerate(candidates) for _ in candidate.examples])
        pool = [c for c in candidates if encoder in ("auto", c.id)]
        best: tuple[float, int, int, str] | None = None
        chosen_features, chosen_pairs = torch.empty(0), []
        for candidate in sorted(pool, key=lambda c: c.parameters):
            by_layer = features_by_layer(candidate.path, texts, remote_code=candidate.remote_code)
            layers = range(len(by_layer)) if layer == "auto" else [min(int(layer), len(by_layer) - 1)]
            for k in layers:
                pairs = leave_one_out(by_layer[k], labels, len(candidates))
                key = (-_accuracy(pairs), k, candidate.parameters, candidate.id)
                if best is None or key < best:
                    best, chosen_features, chosen_pairs = key, by_layer[k], pairs
        if best is None:
            raise ValueError(f"no expert is called '{encoder}'")
        weight, bias = gates(chosen_features, labels, len(candidates))
        save_file({"weight": weight.contiguous(), "bias": bias.contiguous()}, directory / WEIGHTS)
        names = tuple(candidate.id for candidate in candidates)
        confused = Counter(f"{names[own]} -> {names[got]}" for own, got in chosen_pairs if own != got)
        accuracy = _accuracy(chosen_pairs) if chosen_pairs else None
        return RouterManifest(
            kind="prompt",
            experts=names,
            encoder=best[3],
            layer=best[1],
            leave_one_out=accuracy,
            confusions=dict(confused.most_common()),
            margin=margin,
            fallback=fallback,
            warnings=_warnings(candidates, accuracy, confused),
        )

    def load(
        self, manifest: RouterManifest, directory: Path, encoder_path: str, *, remote_code: bool = False
    ) -> Router:
        """Load the gates from `directory` and the encoder's layers from `encoder_path`."""
        weights = load_file(directory / WEIGHTS)
        encoder = Encoder(encoder_path, manifest.layer, remote_code=remote_code)
        return PromptRouter(manifest, encoder, weights["weight"], weights["bias"])


def _accuracy(pairs: list[tuple[int, int]]) -> float:
    """Return the mean over experts of the share of their examples that came back to them."""
    experts = sorted({own for own, _ in pairs})
    if not experts:
        return 0.0
    shares = [[own == got for own, got in pairs if own == expert] for expert in experts]
    return sum(sum(share) / len(share) for share in shares) / len(shares)


def _warnings(candidates: list[Candidate], accuracy: float | None, confused: Counter[str]) -> tuple[str, ...]:
    warnings = []
    for candidate in candidates:
        if len(candidate.examples) < 5:
            warnings.append(f"{candidate.id} has {len(candidate.examples)} example requests; give 5 to 10")
        if candidate.examples and all(len(text.split()) < 2 for text in candidate.examples):
            warnings.append(f"the examples of {candidate.id} are single words; whole requests route far better")
    if accuracy is not None and accuracy < HEALTHY:
        pairs = ", ".join(f"{pair} ({count})" for pair, count in confused.most_common(3))
        warnings.append(f"only {accuracy:.0%} of the examples find their own expert when left out: {pairs}")
    return tuple(warnings)


kind = PromptRouterKind()
