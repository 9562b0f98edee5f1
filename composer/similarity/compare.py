"""The door of the room: the similarity of all pairs of a zoo by the signal that a recipe asks for."""

from dataclasses import dataclass, field
from itertools import combinations

from composer.artefacts import Store
from composer.errors import ZooError
from composer.probes import ProbesSection, compare_records, load_texts, record_probes
from composer.progress import Progress, Step, silent
from composer.similarity.bases import FEWEST_TO_INFER, infer_base
from composer.similarity.gate import comparable, difference, note
from composer.similarity.matrix import SimilarityMatrix
from composer.similarity.moments import Moments, MomentsCache
from composer.similarity.settings import SignalSection
from composer.similarity.streamed import measure
from composer.zoo import Checkpoint, Zoo, make_whole


@dataclass
class _Findings:
    """What is known of all pairs, before it becomes a matrix."""

    values: dict[tuple[str, str], float] = field(default_factory=dict)
    undefined: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    read_bytes: int = 0
    base: str | None = None
    base_reason: str | None = None
    record_bytes: dict[str, int] = field(default_factory=dict)

    def set(self, first: str, second: str, value: float | None, why: str) -> None:
        if value is None:
            self.undefined[f"{first}|{second}"] = why
        else:
            self.values[first, second] = self.values[second, first] = value


def compare(
    zoo: Zoo,
    store: Store,
    signal: SignalSection | None = None,
    probes: ProbesSection | None = None,
    *,
    skip_broken: bool = False,
    progress: Progress = silent,
) -> SimilarityMatrix:
    """Measure the similarity of every pair of models.

    Every tensor of every model is read at most once, whatever the signal, to find what is not finite; what is known
    from earlier comparisons is not read again.

    Args:
        zoo: The described models.
        store: Keeps moments of pairs and probe records by content hash.
        signal: What to compare by; by default the cosine of weights.
        probes: The texts for signals that need a forward pass.
        skip_broken: Leave out models whose weights cannot be used, instead of stopping.
        progress: Told of what is read.

    Raises:
        ZooError: if weights cannot be read or are not finite, naming model, file and tensor.
    """
    signal, probes = signal or SignalSection(), probes or ProbesSection()
    found = _Findings()
    members = zoo.members
    gates = {f"{a.id}|{b.id}": reason for a, b in combinations(members, 2) if (reason := difference(a, b)) is not None}
    notes = {
        f"{a.id}|{b.id}": text
        for a, b in combinations(members, 2)
        if f"{a.id}|{b.id}" not in gates and (text := note(a, b)) is not None
    }
    weights = _Weights(zoo.base, zoo.base_reason, MomentsCache(store), signal, skip_broken, found, progress)
    groups = _groups(members)
    for group in groups:
        weights.measure(group, weights.base_of_shape(group))
    if zoo.base is not None and all(weights.base_of_shape(group) is None for group in groups):
        weights.measure([zoo.base], None)  # nothing to compare it with, but it must be finite
    sound_zoo = zoo.without(found.broken)
    if not sound_zoo.members:
        raise ZooError(f"no model of the zoo can be used; the first: {next(iter(found.broken.values()))}")
    if signal.functional:
        _compare_behaviour(sound_zoo, store, signal, probes, skip_broken, found, progress)
        sound_zoo = zoo.without(found.broken)
    else:
        for group in groups:
            weights.compare([one for one in group if one.id not in found.broken])
    ids = sound_zoo.ids
    return SimilarityMatrix(
        ids=ids,
        values=tuple(tuple(1.0 if a == b else found.values.get((a, b)) for b in ids) for a in ids),
        gates=_among(gates, ids),
        signal=_in_words(signal),
        undefined={key: why for key, why in _among(found.undefined, ids).items() if key not in gates},
        notes=_among(notes, ids),
        bases=_bases(sound_zoo),
        base=found.base,
        base_reason=found.base_reason,
        skipped=found.broken,
        read_bytes=found.read_bytes,
        record_bytes=found.record_bytes,
    )


def _bases(zoo: Zoo) -> dict[str, str]:
    base = zoo.base
    if base is None:
        return {}
    return {one.id: base.id for one in zoo.members if one.id == base.id or difference(base, one) is None}


def _groups(members: tuple[Checkpoint, ...]) -> list[list[Checkpoint]]:
    """Split the zoo into groups in which every pair can be compared by weight; a quantised model stands alone."""
    groups: list[list[Checkpoint]] = []
    for member in members:
        for group in groups:
            if comparable(group[0], member):
                group.append(member)
                break
        else:
            groups.append([member])
    return groups


@dataclass
class _Weights:
    """Comparison by weights or task vectors, group by group."""

    base: Checkpoint | None
    """The zoo's base, if it has one."""
    base_reason: str | None
    cache: MomentsCache
    signal: SignalSection
    skip_broken: bool
    found: _Findings
    progress: Progress

    def base_of_shape(self, group: list[Checkpoint]) -> Checkpoint | None:
        """Return the zoo's base if the group's models can be compared with it."""
        usable = self.base is not None and self.base.id not in self.found.broken and comparable(self.base, group[0])
        return self.base if usable else None

    def measure(self, group: list[Checkpoint], base: Checkpoint | None) -> None:
        """Take what is not known yet of a group's pairs from their weights."""
        result = measure(group, base, self.cache, columns=self.signal.per_column, progress=self.progress)
        self.found.read_bytes += result.read_bytes
        if result.broken and not self.skip_broken:
            name, reason = next(iter(result.broken.items()))
            raise ZooError(f"model '{name}': {reason}")
        self.found.broken |= result.broken

    def compare(self, group: list[Checkpoint]) -> None:
        """Note the similarity of all pairs of a group of sound models."""
        base, reason = self._base(group) if self.signal.signal == "deltas" and len(group) > 1 else (None, "")
        if base is not None:
            self.found.base, self.found.base_reason = base.id, reason
        for first, second in combinations(group, 2):
            if self.signal.signal == "deltas" and base is None:
                value, why = None, f"no task vectors, since {reason}"
            elif base is not None and base.id in (first.id, second.id):
                value, why = None, f"{base.id} is the base and has no task vector"
            else:
                value, why = self._cosine(first, second, base)
            self.found.set(first.id, second.id, value, why)

    def _cosine(self, first: Checkpoint, second: Checkpoint, base: Checkpoint | None) -> tuple[float | None, str]:
        """Return the cosine of two models, or None and why there is none."""
        moments = self._moments(first, second, base)
        value = moments.cosine(self.signal.kinds, columns=self.signal.per_column)
        for one, squares in ((first, moments.first_squares), (second, moments.second_squares)):
            if base is not None and not any(squares):
                return value, f"{one.id} does not differ from the base"
        return value, f"no tensor of {' or '.join(self.signal.modules)} with a direction in both"

    def _base(self, group: list[Checkpoint]) -> tuple[Checkpoint | None, str]:
        """Return the model that the task vectors of a group start from, and how it is known or why none is."""
        if self.base is not None:
            given = self.base_of_shape(group)
            return given, (self.base_reason or "as the recipe says") if given else "the zoo's base is of another shape"
        if len(group) < FEWEST_TO_INFER:
            return None, f"no base is given and it takes {FEWEST_TO_INFER} models of a shape to infer it; set zoo.base"
        self.measure(group, group[0])
        base, reason = infer_base(group, self._moments)
        if base is not None:
            self.measure(group, base)
        return base, reason

    def _moments(self, first: Checkpoint, second: Checkpoint, base: Checkpoint | None) -> Moments:
        hash_of_base = base.content_hash if base is not None else None
        hashes = first.content_hash, second.content_hash
        moments = self.cache.load(*hashes, hash_of_base, columns=self.signal.per_column)
        if moments is None:
            raise RuntimeError(f"the moments of {first.id} and {second.id} were measured but are not in the store")
        return moments


def _compare_behaviour(
    zoo: Zoo,
    store: Store,
    signal: SignalSection,
    probes: ProbesSection,
    skip_broken: bool,
    found: _Findings,
    progress: Progress,
) -> None:
    texts = load_texts(probes.texts, probes.limit, probes.characters)
    records = {}
    for index, member in enumerate(zoo.members):
        progress(Step(stage="compare", message=f"probing {member.id}", done=index, total=len(zoo.members)))
        try:
            make_whole(member, store, progress)
            records[member.id] = record_probes(member, texts, store)
        except ZooError as error:
            if not skip_broken:
                raise
            found.broken[member.id] = str(error).removeprefix(f"model '{member.id}': ")
        else:
            found.record_bytes[member.id] = records[member.id].size_bytes
    progress(Step(stage="compare", message="comparing probe records"))
    for ids, behaviour in compare_records(
        [(one, records[one.id]) for one in zoo.members if one.id in records], store
    ).items():
        if signal.signal == "logits":
            found.set(*ids, behaviour.overlap, behaviour.left_out.get("logits", ""))
        else:
            found.set(*ids, behaviour.alignment, "too few spans of the probe texts fit into both")


def _among(table: dict[str, str], ids: tuple[str, ...]) -> dict[str, str]:
    return {key: value for key, value in table.items() if set(key.split("|")) <= set(ids)}


def _in_words(signal: SignalSection) -> str:
    if signal.signal == "logits":
        return "overlap of next-token distributions"
    if signal.signal == "hidden":
        return "linear CKA of hidden states"
    what = "weight" if signal.signal == "weights" else "task-vector"
    return f"{what} cosine" + (" by input column" if signal.per_column else "")
