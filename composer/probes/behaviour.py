"""How alike two models behave, from their probe records and output heads; no model is run."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from composer.artefacts import Store, digest
from composer.probes.record import VERSION, Head, ProbeRecord
from composer.value import Value
from composer.zoo import Checkpoint, Weights, open_weights
from composer.zoo.tokenizers import shared_ids

if TYPE_CHECKING:
    import torch

VOCABULARY_BLOCK = 2048
"""Tokens of the vocabulary whose probabilities are held at a time."""
HELD_ELEMENTS = 1 << 24
"""Probabilities held at a time, of all models together."""
FEWEST_SPANS = 8
"""Spans of text that two models must have in common for their hidden states to be compared."""
Member = tuple[Checkpoint, ProbeRecord]


class Divergence(Value):
    """Kullback-Leibler divergence in nats, over all positions of the probe texts."""

    mean: float
    median: float
    high: float
    """The ninth decile."""


class Behaviour(Value):
    """How alike two models behave. None with a reason in `left_out` where it cannot be said."""

    forward: Divergence | None = None
    """Of the second's next-token distribution from the first's."""
    backward: Divergence | None = None
    """Of the first's from the second's."""
    overlap: float | None = None
    """Mean Bhattacharyya coefficient of the next-token distributions, 0..1: the cosine of their square roots."""
    top_agreement: float | None = None
    """Share of positions at which both find the same token likeliest."""
    entropy_gap: float | None = None
    """Mean difference of entropies in nats, the first's less the second's."""
    alignment: float | None = None
    """Linear CKA of hidden states pooled over spans of text, mean over relative depths (debiased; Kornblith and others
    2019, arXiv 1905.00414; Nguyen and others 2021, arXiv 2010.15327)."""
    left_out: dict[str, str] = {}

    def reversed(self) -> "Behaviour":
        """Return the same with first and second exchanged."""
        gap = None if self.entropy_gap is None else -self.entropy_gap
        return self.model_copy(update={"forward": self.backward, "backward": self.forward, "entropy_gap": gap})


def compare_records(members: Sequence[Member], store: Store) -> dict[tuple[str, str], Behaviour]:
    """Compare all pairs of models, by ids in the order given; pairs compared before are looked up.

    Records must be of the same texts.
    """
    found: dict[tuple[str, str], Behaviour] = {}
    together: dict[str, list[tuple[Member, Member]]] = {}
    for first, second in combinations(members, 2):
        ids = first[0].id, second[0].id
        path = _path(first, second, store)
        if path.is_file():
            found[ids] = _oriented(Behaviour.load(path), first, second)
        elif (reason := _incomparable(first, second)) is not None:
            found[ids] = Behaviour(left_out={"logits": reason})
        else:
            vocabularies = sorted({_vocabulary(first[0]), _vocabulary(second[0])})
            together.setdefault(digest([vocabularies, first[1].tokens]), []).append((first, second))
    for pairs in together.values():
        found |= _Distributions(pairs).compare()
    for first, second in combinations(members, 2):
        ids = first[0].id, second[0].id
        if not _path(first, second, store).is_file():
            found[ids] = found[ids].model_copy(update={"alignment": _alignment(first[1], second[1])})
            _oriented(found[ids], first, second).save(_path(first, second, store))
    return found


def _path(first: Member, second: Member, store: Store) -> Path:
    key = digest(["behaviour", VERSION, *sorted((first[1].key, second[1].key))])
    return store.path("behaviour", f"{key}.json")


def _oriented(behaviour: Behaviour, first: Member, second: Member) -> Behaviour:
    """Return a pair's behaviour from the way it is called to the way it is kept, or back."""
    return behaviour if first[1].key <= second[1].key else behaviour.reversed()


def _vocabulary(checkpoint: Checkpoint) -> str:
    return f"{checkpoint.tokenizer.vocabulary} {checkpoint.tokenizer.added_tokens}"


def _incomparable(first: Member, second: Member) -> str | None:
    """Return why next-token distributions of two models cannot be compared, or None."""
    for checkpoint, record in (first, second):
        if record.head is None:
            return f"{checkpoint.id}: {record.left_out['logits']}"
    if shared_ids(first[0].tokenizer_home, second[0].tokenizer_home) is None:
        return "another tokenizer: their next-token distributions are over other tokens"
    if first[1].tokens != second[1].tokens:
        alike = sum(a == b for a, b in zip(first[1].tokens, second[1].tokens, strict=True))
        return f"their tokenizers cut only {alike} of {len(first[1].tokens)} probe texts into the same tokens"
    return None


@dataclass
class _Totals:
    """Sums over the vocabulary at each position, in float64."""

    mass: "torch.Tensor"
    """`[positions, models]`: of p."""
    entropies: "torch.Tensor"
    """`[positions, models]`: of p log p."""
    cross: "torch.Tensor"
    """`[positions, models, models]`: of p of one times log p of another, less that of the first model."""
    roots: "torch.Tensor"
    """`[positions, models, models]`: of sqrt(p p')."""
    top: "torch.Tensor"
    """`[positions, models]`: the highest log p."""
    top_token: "torch.Tensor"


class _Distributions:
    """Next-token distributions of several models, rebuilt from records and heads a part of the vocabulary at a time.

    Where vocabularies differ by added tokens, distributions are over the tokens both have, and sum to 1 over those.
    """

    def __init__(self, pairs: list[tuple[Member, Member]]) -> None:
        """Prepare for pairs over the same two vocabularies (or one) and the same tokens of the same texts."""
        self.pairs = pairs
        self.members = list({one[0].id: one for pair in pairs for one in pair}.values())
        self.weights: list[Weights] = [open_weights(one.source, Path(one.home)) for one, _ in self.members]

    def compare(self) -> dict[tuple[str, str], Behaviour]:
        """Compare all pairs."""
        totals = self._totals()
        place = {member[0].id: index for index, member in enumerate(self.members)}
        return {
            (first[0].id, second[0].id): _summary(totals, place[first[0].id], place[second[0].id])
            for first, second in self.pairs
        }

    def _totals(self) -> _Totals:
        import torch

        count, positions = len(self.members), sum(map(len, self.members[0][1].tokens))
        first, second = self.pairs[0]
        shared = shared_ids(first[0].tokenizer_home, second[0].tokenizer_home) or ()
        rows = min(one.headers[self._head(place).weight].rows for place, one in enumerate(self.weights))
        tokens = torch.tensor([token for token in shared if token < rows])
        hidden = [self._hidden(place) for place in range(count)]
        normalisers = [record.arrays["normaliser"] for _, record in self.members]
        totals = _Totals(
            mass=torch.zeros(positions, count, dtype=torch.float64),
            entropies=torch.zeros(positions, count, dtype=torch.float64),
            cross=torch.zeros(positions, count, count, dtype=torch.float64),
            roots=torch.zeros(positions, count, count, dtype=torch.float64),
            top=torch.full((positions, count), float("-inf")),
            top_token=torch.zeros(positions, count, dtype=torch.long),
        )
        step = max(1, HELD_ELEMENTS // (count * VOCABULARY_BLOCK))
        for block in torch.split(tokens, VOCABULARY_BLOCK):
            heads = [self._head_rows(place, block) for place in range(count)]
            for start in range(0, positions, step):
                part = slice(start, start + step)
                logs = torch.stack(
                    [
                        self._head(k).apply(torch.addmm(bias, hidden[k][part], weight.T)) - normalisers[k][part, None]
                        for k, (weight, bias) in enumerate(heads)
                    ],
                    dim=1,
                )
                _add(totals, part, logs, block)
        return totals

    def _head(self, place: int) -> Head:
        head = self.members[place][1].head
        if head is None:
            raise ValueError("pairs without a head are left out before")
        return head

    def _hidden(self, place: int) -> "torch.Tensor":
        arrays = self.members[place][1].arrays
        hidden: torch.Tensor = arrays["hidden"].float() * arrays["scale"][:, None]
        return hidden

    def _head_rows(self, place: int, tokens: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        head, weights = self._head(place), self.weights[place]
        first, last = int(tokens[0]), int(tokens[-1]) + 1
        weight = weights.read(head.weight, first, last).float()[tokens - first]
        if head.bias is None:
            return weight, weight.new_zeros(len(tokens))
        return weight, weights.read(head.bias, first, last).float()[tokens - first]


def _add(totals: _Totals, part: slice, logs: "torch.Tensor", tokens: "torch.Tensor") -> None:
    """Add log-probabilities of some tokens at some positions, `[positions, models, tokens]`."""
    import torch

    logs = logs.clamp_(min=-200.0)  # a token that is ruled out adds nothing, rather than 0 times infinity
    roots = (logs / 2).exp()
    probabilities = roots.square()
    totals.mass[part] += probabilities.sum(dim=2)
    totals.entropies[part] += (probabilities * logs).sum(dim=2)
    highest, where = logs.max(dim=2)
    better = highest > totals.top[part]
    totals.top_token[part] = torch.where(better, tokens[where], totals.top_token[part])
    totals.top[part] = torch.where(better, highest, totals.top[part])
    totals.roots[part] += torch.bmm(roots, roots.transpose(1, 2))
    # Close models differ in late digits: differences are taken before they are added up.
    totals.cross[part] += torch.bmm(probabilities, (logs - logs[:, :1]).transpose(1, 2))


def _summary(totals: _Totals, i: int, j: int) -> Behaviour:
    """Return the behaviour of models `i` and `j`, each distribution made to sum to 1 over the tokens compared."""
    mass, entropies = totals.mass.clamp_min(1e-30), totals.entropies
    entropy = mass.log() - entropies / mass

    def divergence(a: int, b: int) -> Divergence:
        values = (totals.cross[:, a, a] - totals.cross[:, a, b]) / mass[:, a] + (mass[:, b] / mass[:, a]).log()
        return Divergence(mean=float(values.mean()), median=float(values.median()), high=float(values.quantile(0.9)))

    return Behaviour(
        forward=divergence(i, j),
        backward=divergence(j, i),
        overlap=float((totals.roots[:, i, j] / (mass[:, i] * mass[:, j]).sqrt()).mean()),
        top_agreement=float((totals.top_token[:, i] == totals.top_token[:, j]).double().mean()),
        entropy_gap=float((entropy[:, i] - entropy[:, j]).mean()),
    )


def _alignment(first: ProbeRecord, second: ProbeRecord) -> float | None:
    """Return the mean CKA over the depths below the embedding's; None if too few spans are filled in both."""
    import torch

    values = []
    a, b = first.arrays["pooled"], second.arrays["pooled"]
    for depth in range(1, a.shape[2]):
        x, y = (one[:, :, depth].flatten(0, 1).double() for one in (a, b))
        both = ~(x.isnan().any(dim=1) | y.isnan().any(dim=1))
        if int(both.sum()) >= FEWEST_SPANS:
            values.append(_cka(x[both], y[both]))
    return float(torch.tensor(values).mean()) if values else None


def _cka(x: "torch.Tensor", y: "torch.Tensor") -> float:
    """Return debiased linear CKA of `[items, features]` and `[items, other features]`."""
    k, m = _similarities(x), _similarities(y)
    scale = (_hsic(k, k) * _hsic(m, m)).clamp_min(1e-300).sqrt()
    return float((_hsic(k, m) / scale).clamp(-1, 1))


def _similarities(x: "torch.Tensor") -> "torch.Tensor":
    x = x - x.mean(dim=0)
    gram: torch.Tensor = x @ x.T
    return gram.fill_diagonal_(0)


def _hsic(k: "torch.Tensor", m: "torch.Tensor") -> "torch.Tensor":
    """Return the unbiased estimate of HSIC from two matrices with zero diagonals, `[items, items]`."""
    n = len(k)
    middle = k.sum() * m.sum() / ((n - 1) * (n - 2))
    value: torch.Tensor = (k * m).sum() + middle - 2 / (n - 2) * (k.sum(dim=0) @ m.sum(dim=0))
    return value / (n * (n - 3))
