"""Routers that read: an encoder's feature of the text, and gates that score it.

Kinds differ in their gates alone. Which expert's layers read, and how many of them, is chosen by leave-one-out on the
example requests, without labels.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from composer.errors import RouterError
from composer.registry import nearest
from routers import Brief, Candidate, Decision, EncoderManifest, Labelled, Router, RouterManifest
from routers.encoders import Encoder, Pool, features_by_layer, load_encoder, make_table

WEIGHTS = "router.safetensors"
HEALTHY = 0.7
"""Below this leave-one-out accuracy a router is reported as doubtful."""
COLLINEAR = 10.0
"""Above this condition number, some gates' directions are nearly the same."""
FEW = 5
"""Examples that an expert should have."""
FOLDS = 10
"""Parts in which gates that take long to fit are tried on what they have not seen."""
CLEAR = 0.8
"""Of layers that are right equally often, those that are this nearly as clear as the clearest will do."""


class Gates(Protocol):
    """Scores experts by features; one for each kind of router."""

    pool: Pool
    """Over which tokens of an example."""
    bos: bool
    """Whether examples and requests are read with the token that begins a text."""
    learns: bool
    """Whether labelled texts are of use beside the examples."""
    quick: bool
    """Whether fitting takes so little that every layer can be tried with every example left out."""
    grouped: bool
    """Whether an expert whose examples are of several kinds has a gate for each kind; its score is the best of them."""

    def fit(self, features: Tensor, shares: Tensor, seed: int = 0) -> dict[str, Tensor]:
        """Make the gates.

        Args:
            features: `[texts, width]`.
            shares: `[texts, gates]`, each row adds up to one: how far a gate is right for a text.
            seed: Of what is drawn at random.

        Returns:
            What `score` needs, by name.
        """
        ...

    def score(self, weights: dict[str, Tensor], features: Tensor) -> Tensor:
        """Return the scores of texts, `[texts, gates]`, from their features, `[texts, width]`."""
        ...

    def directions(self, weights: dict[str, Tensor]) -> Tensor | None:
        """Return the gates' directions among standardised features, `[gates, width]`; None if there are none."""
        ...


@dataclass
class GatedRouter:
    """An encoder, gates and a policy."""

    manifest: RouterManifest
    encoder: Encoder
    gates: Gates
    weights: dict[str, Tensor]

    @torch.inference_mode()
    def route(self, text: str) -> Decision:
        """Return the expert for one text."""
        scores = by_expert(self.gates.score(self.weights, self.encoder(text)[None]), self.manifest.owners)[0]
        return self.manifest.policy.decide(dict(zip(self.manifest.experts, scores.tolist(), strict=True)))


@dataclass(frozen=True)
class GatedKind:
    """Builds and loads routers of one kind of gates."""

    name: str
    gates: Gates

    def build(self, brief: Brief, directory: Path) -> RouterManifest:
        """Choose the encoder, fit the gates, and write what they need into `directory`.

        Of encoders that are equally often right and nearly equally clear, the cheapest is taken: fewer layers first,
        then the smaller model.

        Raises:
            RouterError: if an expert has no example, two have the same ones, or the encoder cannot be loaded.
        """
        candidates = brief.candidates
        check_examples(candidates)
        names = tuple(one.id for one in candidates)
        texts = [text for one in candidates for text in one.examples]
        owners = owners_of(candidates) if self.gates.grouped else ()
        shares = shares_of(candidates, owners=owners)
        encoder = self._choose(brief, texts)
        if brief.table:
            encoder = make_table(encoder.source, encoder.layers, candidates, directory)
        # Fitted to what the router itself will read, to the last bit.
        read = load_encoder(encoder, directory, candidates, bos=self.gates.bos, pool=self.gates.pool)
        features = torch.stack([read(text) for text in texts])
        pairs = [one.pair for one in left_out(self.gates, features, shares, owners, brief.seed)]
        labelled = brief.labelled if self.gates.learns else ()
        if labelled:
            read = load_encoder(encoder, directory, candidates, bos=self.gates.bos)
            features = torch.cat([features, torch.stack([read(one.text) for one in labelled])])
            shares = shares_of(candidates, labelled, owners)
        weights = self.gates.fit(features, shares, brief.seed)
        save_file({name: one.contiguous() for name, one in weights.items()}, directory / WEIGHTS)
        confused = Counter(f"{names[a]} -> {names[b]}" for a, b in pairs if a != b)
        accuracy = macro(pairs) if pairs else None
        directions = self.gates.directions(weights)
        condition = None if directions is None else condition_number(_mean_by_expert(directions, owners))
        return RouterManifest(
            kind=self.name,
            experts=names,
            policy=brief.policy,
            owners=owners,
            encoder=encoder,
            leave_one_out=accuracy,
            confusions=dict(confused.most_common()),
            condition=condition,
            learnt_from=len(labelled),
            warnings=warnings_of(candidates, accuracy, confused, condition),
        )

    def load(self, manifest: RouterManifest, directory: Path, candidates: tuple[Candidate, ...]) -> Router:
        """Load the gates from `directory`, and the encoder."""
        assert manifest.encoder is not None  # noqa: S101 - `build` always gives one
        encoder = load_encoder(manifest.encoder, directory, candidates, bos=self.gates.bos)
        return GatedRouter(manifest, encoder, self.gates, load_file(directory / WEIGHTS))

    def _choose(self, brief: Brief, texts: list[str]) -> EncoderManifest:
        """Return the encoder that tells the examples apart best."""
        pool = [one for one in brief.candidates if brief.encoder == one.id or (brief.encoder == "auto" and one.reads)]
        if not pool:
            return self._sentence(brief)
        # Gates that take long to fit are chosen a layer for by those of router `prompt`.
        trial = self.gates if self.gates.quick else _quick()
        owners = owners_of(brief.candidates) if trial.grouped else ()
        shares = shares_of(brief.candidates, owners=owners)
        tried: list[Tried] = []
        failed: list[str] = []
        for candidate in sorted(pool, key=lambda one: one.parameters):
            most = brief.most_layers if brief.layer == "auto" else brief.layer
            try:
                by_layer = features_by_layer(candidate, texts, most, pool=self.gates.pool, bos=self.gates.bos)
            except RouterError as error:
                failed.append(str(error))
                continue
            layers = range(len(by_layer)) if brief.layer == "auto" else [brief.layer]
            if layers[-1] >= len(by_layer):
                failed.append(f"mixture.router.layer: {brief.layer}, but {candidate.id} has {len(by_layer) - 1} layers")
                continue
            only = len(layers) * len(pool) == 1
            for layer in layers:
                found = [] if only else left_out(trial, by_layer[layer], shares, owners)
                accuracy = macro([one.pair for one in found])
                tried.append(Tried(accuracy, clearness(found), layer, candidate.parameters, candidate.id))
        if not tried:
            raise RouterError(failed[0])
        best = chosen_of(tried)
        return EncoderManifest(kind="layers", source=best.id, layers=best.layer)

    def _sentence(self, brief: Brief) -> EncoderManifest:
        names = [one.id for one in brief.candidates]
        close = "" if Path(brief.encoder).is_dir() else nearest(brief.encoder, names)
        if close:
            raise RouterError(f"mixture.router.encoder: '{brief.encoder}' is no expert{close}")
        if brief.layer != "auto":
            raise RouterError(
                f"mixture.router.layer: {brief.layer}, but a sentence encoder is read whole; leave it out"
            )
        return EncoderManifest(kind="sentence", source=brief.encoder)


@dataclass(frozen=True)
class LeftOut:
    """What gates make of an example that they were made without."""

    own: int
    """Its expert."""
    chosen: int
    lead: float
    """How far its own expert's score is ahead of the best other one's; negative if it is behind."""

    @property
    def pair(self) -> tuple[int, int]:
        """Its own expert, and the one that was chosen."""
        return self.own, self.chosen


@dataclass(frozen=True)
class Tried:
    """A layer that could read prompts, tried on examples that its gates were made without."""

    accuracy: float
    """Mean over experts of the share of their examples that came back to them."""
    clearness: float
    layer: int
    parameters: int
    id: str


def chosen_of(tried: Sequence[Tried]) -> Tried:
    """Return the cheapest of the layers that are right most often, and nearly as clear as the clearest of these."""
    right = [one for one in tried if one.accuracy == max(other.accuracy for other in tried)]
    clear = [one for one in right if one.clearness >= CLEAR * max(other.clearness for other in right)]
    return min(clear or right, key=lambda one: (one.layer, one.parameters, one.id))


def owners_of(candidates: Sequence[Candidate]) -> tuple[int, ...]:
    """Return the expert of each gate if there is one for each kind of examples; empty if each expert has one kind."""
    owners = tuple(place for place, one in enumerate(candidates) for _ in one.kinds)
    return owners if len(owners) > len(candidates) else ()


def by_expert(scores: Tensor, owners: Sequence[int]) -> Tensor:
    """Return the best score of each expert's gates, `[texts, experts]`.

    Args:
        scores: `[texts, gates]`.
        owners: The expert of each gate; empty if each has one, in their order.
    """
    if not owners:
        return scores
    places = torch.tensor(owners).expand(len(scores), -1)
    empty = scores.new_full((len(scores), max(owners) + 1), -torch.inf)
    return empty.scatter_reduce(1, places, scores, "amax")


def _mean_by_expert(directions: Tensor, owners: Sequence[int]) -> Tensor:
    """Return the mean direction of each expert's gates: those of one expert may well be alike."""
    if not owners:
        return directions
    member = nn.functional.one_hot(torch.tensor(owners)).float()
    return (member / member.sum(dim=0)).T @ directions


def shares_of(candidates: Sequence[Candidate], labelled: Sequence[Labelled] = (), owners: Sequence[int] = ()) -> Tensor:
    """Return how far each gate is right for each example, then for each labelled text, `[texts, gates]`.

    Args:
        candidates: The experts and their examples.
        labelled: Texts that are known to be for an expert; its gates share them.
        owners: From `owners_of`; empty for one gate for each expert.
    """
    counts = [one.kinds if owners else (len(one.examples),) for one in candidates]
    gate = torch.tensor([number for number, count in enumerate(c for own in counts for c in own) for _ in range(count)])
    of_gate = owners or range(len(candidates))
    width = len(of_gate)
    rows = [
        [one.shares.get(candidates[own].id, 0.0) / (len(counts[own]) if owners else 1) for own in of_gate]
        for one in labelled
    ]
    return torch.cat([nn.functional.one_hot(gate, width).float(), torch.tensor(rows).reshape(-1, width)])


def left_out(
    gates: Gates, features: Tensor, shares: Tensor, owners: Sequence[int] = (), seed: int = 0
) -> list[LeftOut]:
    """Return what becomes of each example with gates that are made without it.

    Gates that take long to fit leave out several at once. An example that is the only one of its gate is passed over.

    Args:
        gates: What is tried.
        features: `[examples, width]`.
        shares: `[examples, gates]`.
        owners: The expert of each gate; empty if each has one, in their order.
        seed: Of what is drawn at random.
    """
    labels = shares.argmax(dim=1)
    counts = torch.bincount(labels, minlength=shares.shape[1])
    usable = [place for place in range(len(labels)) if counts[labels[place]] > 1]
    parts: list[list[int]] = [[place] for place in usable]
    if not gates.quick:
        # Of each expert's own examples every FOLDS-th: whoever has two or more keeps some.
        seen: Counter[int] = Counter()
        folds: dict[int, list[int]] = {}
        for place in usable:
            own = int(labels[place])
            folds.setdefault(seen[own] % FOLDS, []).append(place)
            seen[own] += 1
        parts = list(folds.values())
    of_gate = owners or range(shares.shape[1])
    found = []
    for part in parts:
        kept = torch.ones(len(labels), dtype=torch.bool)
        kept[part] = False
        weights = gates.fit(features[kept], shares[kept], seed)
        scores = by_expert(gates.score(weights, features[part]), owners)
        for place, row in zip(part, scores, strict=True):
            own = of_gate[int(labels[place])]
            others = torch.cat([row[:own], row[own + 1 :]])
            found.append(LeftOut(own, int(row.argmax()), float(row[own] - others.max()) if len(others) else 0.0))
    return found


def clearness(found: Sequence[LeftOut]) -> float:
    """Return the mean lead of the experts that are right over its standard deviation; scale-free, 0 if there is none.

    It goes on telling layers apart where they are all right on a few examples.
    """
    leads = torch.tensor([one.lead for one in found])
    if len(leads) < 2 or not bool(leads.isfinite().all()):
        return 0.0
    return float(leads.mean() / leads.std(correction=0).clamp_min(1e-12))


def macro(pairs: list[tuple[int, int]]) -> float:
    """Return the mean over experts of the share of their examples that came back to them."""
    experts = sorted({own for own, _ in pairs})
    if not experts:
        return 0.0
    shares = [[own == got for own, got in pairs if own == expert] for expert in experts]
    return sum(sum(share) / len(share) for share in shares) / len(shares)


def condition_number(directions: Tensor) -> float:
    """Return the condition number of some directions, `[experts, width]`, each scaled to length 1.

    One-vs-rest differences add up to about zero, which makes the smallest singular value small whatever the gates are;
    so it is the second smallest that counts, unless there are two experts, which are opposite to each other.
    """
    if len(directions) < 3:
        return 1.0
    unit = directions / directions.norm(dim=1, keepdim=True).clamp_min(1e-12)
    values = torch.linalg.svdvals(unit)
    return float(values[0] / values[len(directions) - 2].clamp_min(1e-12))


def _quick() -> Gates:
    from routers.prompt import gates

    return gates


def check_examples(candidates: Sequence[Candidate]) -> None:
    """Check that there is something to tell experts by.

    Raises:
        RouterError: if an expert has no example, or two have the same ones.
    """
    for one in candidates:
        if not one.examples:
            raise RouterError(f"expert '{one.id}' has no example requests, so no prompt can find it")
    seen: dict[frozenset[str], str] = {}
    for one in candidates:
        other = seen.setdefault(frozenset(one.examples), one.id)
        if other != one.id:
            raise RouterError(
                f"experts '{other}' and '{one.id}' have the same example requests, so nothing tells them apart; "
                "give each its own, or leave one of them out"
            )


def warnings_of(
    candidates: Sequence[Candidate], accuracy: float | None, confused: Counter[str], condition: float | None
) -> tuple[str, ...]:
    """Return what whoever builds a router should know.

    Args:
        candidates: The experts and their examples.
        accuracy: Of examples that were left out.
        confused: How many examples of one expert went to another, by "expert -> other".
        condition: Condition number of the gates' directions.
    """
    warnings = []
    owner: dict[str, str] = {}
    for candidate in candidates:
        if len(candidate.examples) < FEW:
            warnings.append(f"{candidate.id} has {len(candidate.examples)} example requests; give 5 to 10")
        if all(len(text.split()) < 2 for text in candidate.examples):
            warnings.append(f"the examples of {candidate.id} are single words; whole requests route far better")
        shared = [text for text in candidate.examples if owner.setdefault(text, candidate.id) != candidate.id]
        if shared:
            warnings.append(
                f"{candidate.id} and {owner[shared[0]]} share {len(shared)} examples, e.g. {shared[0][:60]!r}"
            )
    if accuracy is not None and accuracy < HEALTHY:
        pairs = ", ".join(f"{pair} ({count})" for pair, count in confused.most_common(3))
        warnings.append(f"only {accuracy:.0%} of the examples find their own expert when left out: {pairs}")
    if condition is not None and condition > COLLINEAR:
        warnings.append(
            f"some gates point nearly the same way (condition number {condition:.0f}): "
            "the examples of some experts are alike"
        )
    return tuple(warnings)
