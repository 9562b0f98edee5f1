"""What is known of some models that could be merged, in a few small arrays, with no merge made.

Everything is kept as inner products of differences from an origin, the base or, without one, the models' mean: of
weights, exactly, and of behaviour on texts, where for small differences the Kullback-Leibler divergence is half a
squared length (in the Fisher metric). So what holds of the models holds, by algebra, of any blend of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from composer.artefacts import Store
from composer.errors import MergeError
from composer.evaluation.answers import AnswerTable
from composer.evaluation.in_process import answer_checkpoint
from composer.evaluation.live import prompts
from composer.evaluation.tasks import Split
from composer.probes import Behaviour, ProbesSection, compare_records, load_texts, record_probes
from composer.progress import Progress, Step, silent
from composer.similarity.moments import Moments, MomentsCache
from composer.similarity.streamed import measure
from composer.simmerge.footprint import spectra, take_sample
from composer.zoo import Checkpoint, open_weights, read_blocks
from composer.zoo.kinds import kind_of, layer_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

BANDS = ("attention.early", "attention.middle", "attention.late", "mlp.early", "mlp.middle", "mlp.late")
"""Kinds of tensors by thirds of the depth."""
PROMPTS = 8
"""Prompts of a task that models are compared on."""
TEXTS = 16
"""Probe texts that they are compared on besides, at most."""
BLOCK = 1 << 20
"""Elements read at a time."""


@dataclass(frozen=True)
class Manners:
    """How models behave on some texts, compared pair by pair."""

    gram: "Array"
    """`[models, models]`, nats: inner products of differences from the origin; half a squared length is a divergence.
    nan where it cannot be said."""
    agreement: "Array"
    """`[models, models]`: share of positions at which both find the same token likeliest."""
    alignment: "Array"
    """`[models, models]`: linear CKA of hidden states."""
    entropy: "Array"
    """`[models]`, nats: mean entropy less the origin's."""


@dataclass(frozen=True)
class Signals:
    """What is known of some models.

    Attributes:
        ids: The models.
        based: Whether the origin is a base that they were fine-tuned from; else it is their mean.
        weights: `[bands, models, models]`: inner products of weight differences from the origin.
        size: Norm of the origin's weights in all bands.
        signs: `[models, models]`: share of weights whose differences from the origin have one sign.
        energy: `[models]`: share of a difference's squared length in its strongest directions.
        overlap: `[models, models]`: how far these directions are the same, 0..1.
        plain: Behaviour on the probe texts, which belong to no task.
        tasks: Behaviour on each task's own prompts.
        answers: Answers of the origin, then of each model, to the items of each task that has choices or likelihoods.
    """

    ids: tuple[str, ...]
    based: bool
    weights: "Array"
    size: float
    signs: "Array"
    energy: "Array"
    overlap: "Array"
    plain: Manners
    tasks: dict[str, Manners]
    answers: dict[str, AnswerTable]

    def scores(self, task: str) -> "Array":
        """Return what the origin and each model score on a task's items, `[1 + models]`; nan if that is not known."""
        table = self.answers.get(task)
        if table is None:
            return np.full(1 + len(self.ids), np.nan)
        found: Array = table.score(table.likelihoods).mean(axis=-1)
        return found

    def levels(self, task: str) -> "Array":
        """Return what each model is expected to score on other items of a task, `[models]`; 0 if nothing is known.

        Scores are drawn to the mean of all: the best of several noisy ones is too good, the empirical Bayes estimate
        (James and Stein 1961) is not.
        """
        table = self.answers.get(task)
        count = len(self.ids)
        if table is None:
            return np.zeros(count)
        values = table.score(table.likelihoods[1:])
        means = values.mean(axis=1)
        noise = float((values.var(axis=1, ddof=1) / values.shape[1]).mean()) if values.shape[1] > 1 else 0.0
        spread = float(means.var(ddof=1)) if count > 1 else 0.0
        keep = max(0.0, 1 - noise / spread) if spread > 0 else 0.0
        found: Array = means.mean() + keep * (means - means.mean())
        return found


def observe(checkpoint: Checkpoint, split: Split, probes: ProbesSection, store: Store, *, batch_size: int = 16) -> None:
    """Run a model once over everything it will be compared by, and keep what it does.

    Raises:
        ZooError: if transformers cannot load it.
        EvaluationError: if it cannot answer the items.
    """
    _observe(checkpoint, split, _texts(split, probes), store, batch_size)


def _observe(
    checkpoint: Checkpoint, split: Split, texts: dict[str, tuple[str, ...]], store: Store, batch_size: int = 16
) -> None:
    for own in texts.values():
        record_probes(checkpoint, own, store)
    answer_checkpoint(checkpoint, split, store, batch_size=batch_size)


def gather(
    models: Sequence[Checkpoint],
    base: Checkpoint | None,
    split: Split,
    probes: ProbesSection,
    store: Store,
    progress: Progress = silent,
) -> Signals:
    """Bring together what is known of some models; what was not observed yet is observed now.

    Args:
        models: Two or more of one shape and vocabulary.
        base: The checkpoint they were fine-tuned from, if it is known.
        split: The items whose prompts and answers count; no other split is looked at.
        probes: The texts that belong to no task.
        store: Keeps moments, records and answers by content hash.
        progress: Told of each model.

    Raises:
        MergeError: for fewer than two models.
    """
    if len(models) < 2:
        raise MergeError(f"a merge needs two models, and there is {len(models)}")
    everyone = [*([base] if base else []), *models]
    texts = _texts(split, probes)
    for done, one in enumerate(everyone, start=1):
        _observe(one, split, texts, store)
        progress(Step(stage="plan", message=f"observed {one.id}", done=done, total=len(everyone)))
    cache = MomentsCache(store)
    measure(list(models), base or models[0], cache, columns=False, progress=progress)
    weights, size, signs = _weights(models, base, cache)
    energy, overlap = spectra(take_sample(models, base))
    manners = {
        name: _manners([(one, record_probes(one, asked, store)) for one in everyone], base is not None, store)
        for name, asked in texts.items()
    }
    answers = {}
    own = [answer_checkpoint(one, split, store) for one in everyone]
    for items in split.tasks:
        found = [one.task(items.name) for one in own]
        known = [one for one in found if one is not None]
        if len(known) == len(everyone):
            table = AnswerTable.of(known)
            if base is None:
                mean = table.likelihoods.mean(axis=0, keepdims=True)
                table = AnswerTable(np.concatenate([mean, table.likelihoods]), table.lengths, table.values)
            answers[items.name] = table
    return Signals(
        ids=tuple(one.id for one in models),
        based=base is not None,
        weights=weights,
        size=size,
        signs=signs,
        energy=energy,
        overlap=overlap,
        plain=manners.pop(""),
        tasks=manners,
        answers=answers,
    )


def _texts(split: Split, probes: ProbesSection) -> dict[str, tuple[str, ...]]:
    """Return the texts of each task, and under "" those of none."""
    plain = load_texts(probes.texts, min(probes.limit, TEXTS), probes.characters)
    return {"": tuple(plain), **prompts(split, PROMPTS)}


def _weights(
    models: Sequence[Checkpoint], base: Checkpoint | None, cache: MomentsCache
) -> tuple["Array", float, "Array"]:
    """Return inner products by band, the origin's norm, and the agreement of signs.

    Fine-tunes differ in the third decimal, so their differences are multiplied, never the weights themselves: without
    a base, those from the first model, which are then seen from the mean.
    """
    count = len(models)
    grams, signs = np.zeros((len(BANDS), count, count)), np.full((count, count), 0.5)
    origin = base or models[0]
    others = [place for place, one in enumerate(models) if one.content_hash != origin.content_hash]
    for i, j in combinations(others, 2):
        moments = cache.load(models[i].content_hash, models[j].content_hash, origin.content_hash, columns=False)
        if moments is None:
            raise MergeError(f"'{models[i].id}' and '{models[j].id}' cannot be compared by their weights")
        dots, firsts, seconds = _by_band(moments, models[i].layers or 1)
        grams[:, i, j] = grams[:, j, i] = dots
        grams[:, i, i], grams[:, j, j] = firsts, seconds
        signs[i, j] = signs[j, i] = moments.sign_agreement(("attention", "mlp")) or 0.0
    if len(others) == 1:
        grams[:, others[0], others[0]] = _squares(models[others[0]], origin)
    plain = cache.load(models[others[0]].content_hash, origin.content_hash, None, columns=False) if others else None
    size = 0.0 if plain is None else float(np.sqrt(_by_band(plain, origin.layers or 1)[2].sum()))
    if base is None:
        centre = np.eye(count) - 1 / count
        grams = centre @ grams @ centre
    return grams, size, signs


def _squares(model: Checkpoint, origin: Checkpoint) -> "Array":
    """Return the squared length of one model's difference from another, by band."""
    theirs, ours = (open_weights(one.source, Path(one.home)) for one in (origin, model))
    squares = np.zeros(len(BANDS))
    for name, header in ours.headers.items():
        band = _band(name, model.layers or 1)
        if band is not None and header.floating:
            blocks = zip(read_blocks(ours, name, BLOCK), read_blocks(theirs, name, BLOCK), strict=True)
            squares[band] += sum(float((one.double() - other.double()).square().sum()) for one, other in blocks)
    return squares


def _band(name: str, layers: int) -> int | None:
    layer, kind = layer_of(name), kind_of(name)
    if layer is None or kind not in ("attention", "mlp"):
        return None
    return BANDS.index(f"{kind}.{('early', 'middle', 'late')[min(2, 3 * layer // layers)]}")


def _by_band(moments: Moments, layers: int) -> tuple["Array", "Array", "Array"]:
    sums = np.zeros((3, len(BANDS)))
    for place, name in enumerate(moments.names):
        band = _band(name, layers)
        if band is not None:
            sums[:, band] += moments.dots[place], moments.first_squares[place], moments.second_squares[place]
    return sums[0], sums[1], sums[2]


def _manners(members: list[tuple[Checkpoint, "object"]], based: bool, store: Store) -> Manners:
    """Compare models on the same texts; with `based`, the first is the base."""
    pairs = compare_records(members, store)  # type: ignore[arg-type]
    count = len(members)
    far, agreement, alignment = np.zeros((count, count)), np.eye(count), np.eye(count)
    entropy = np.zeros(count)
    for (i, (first, _)), (j, (second, _)) in combinations(enumerate(members), 2):
        found: Behaviour = pairs[first.id, second.id]
        both = (found.forward, found.backward)
        far[i, j] = far[j, i] = np.nan if None in both else sum(one.mean for one in both if one)
        agreement[i, j] = agreement[j, i] = np.nan if found.top_agreement is None else found.top_agreement
        alignment[i, j] = alignment[j, i] = np.nan if found.alignment is None else found.alignment
        if i == 0:
            entropy[j] = np.nan if found.entropy_gap is None else -found.entropy_gap
    # Half the sum of both divergences is half a squared length: the sum is the squared length.
    if based:
        gram = (far[1:, :1] + far[:1, 1:] - far[1:, 1:]) / 2
        return Manners(gram, agreement[1:, 1:], alignment[1:, 1:], entropy[1:])
    centre = np.eye(count) - 1 / count
    return Manners(-centre @ far @ centre / 2, agreement, alignment, entropy - entropy.mean())
