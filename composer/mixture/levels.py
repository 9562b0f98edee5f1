"""Mixtures inside one model: what the recipe's level makes of experts that fit."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from composer.artefacts import Store, digest
from composer.errors import RecipeError
from composer.merging.engine.export import export
from composer.merging.engine.merge import Merge
from composer.merging.engine.shelf import Shelf
from composer.merging.plan import MergeStep
from composer.mixture.composite import Expert
from composer.mixture.gates import Gates, Level, gate_inputs
from composer.mixture.settings import MixtureSection
from composer.mixture.shapes import check_level, check_tokenizers, reads
from composer.registry import nearest
from composer.zoo import Checkpoint, Lineage, inspect_checkpoint
from routers import ROUTERS, Brief, RouterManifest

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 2
"""Changes when the same experts and settings give another model."""


def mix_inside(
    name: str, experts: Sequence[Expert], section: MixtureSection, brief: Brief, store: Store
) -> tuple[Expert, RouterManifest]:
    """Write experts as one model, unless it has been written before.

    Args:
        name: What the model is called.
        experts: Two or more.
        section: The recipe's `mixture`, of which `inside` holds.
        brief: What the gates are made from.
        store: Keeps the model.

    Returns:
        The model as an expert of its own, and how its gates were made.

    Raises:
        RecipeError: if the experts do not fit, with the property that differs and the level that would work.
        RouterError: if gates cannot be made of the example requests.
    """
    write = _Fusion(experts, section, brief) if section.level == "model" else _Layers(experts, section, brief, store)
    gates = brief.model_dump(exclude={"policy", "candidates"})
    examples = [one.examples for one in experts]
    settings = [
        section.level,
        section.dense,
        section.layers.model_dump(),
        section.router.kind,
        section.router.temperature,
    ]
    key = digest([VERSION, settings, [one.checkpoint.content_hash for one in experts], examples, gates])
    path = store.path("mixtures", key)
    if not path.is_dir():
        with store.new_directory("mixtures", key) as directory:
            manifest = write.write(directory)
            manifest.save(directory / "gates.json")
    checkpoint = inspect_checkpoint(name, path, store)
    lineage = Lineage(
        operator=f"mixture of {section.level}s" if section.level != "ffn" else "mixture of MLPs",
        inputs=tuple(one.id for one in experts),
        input_hashes=tuple(one.checkpoint.content_hash for one in experts),
        parameters={"top_k": float(section.top_k)},
        licences={source: licence for one in experts for source, licence in one.licences.items()},
        dequantised={source: kind for one in experts for source, kind in one.checkpoint.dequantised.items()},
    )
    whole = Expert(
        id=name,
        checkpoint=checkpoint.renamed(name, lineage),
        members=tuple(dict.fromkeys(source for one in experts for source in one.members)),
        examples=(),
        reason=f"{lineage.operator} of {', '.join(one.id for one in experts)}, {section.top_k} at a time",
    )
    return whole, RouterManifest.load(path / "gates.json")


class _Fusion:
    """Whole models whose distributions are averaged."""

    def __init__(self, experts: Sequence[Expert], section: MixtureSection, brief: Brief) -> None:
        self.experts, self.section = experts, section
        check_tokenizers([one.checkpoint for one in experts], section.top_k)
        names = [one.id for one in experts if reads(one.checkpoint)]
        if brief.encoder not in ("auto", *names) or not names:
            raise RecipeError(
                f"mixture.router.encoder: '{brief.encoder}' cannot read the prompt where mixture.top_k is above 1; "
                f"{', '.join(names) or 'none of the experts'} can, mixture.top_k: 1 takes any"
            )
        # The gate inside has one row for each expert.
        pool = tuple(one.model_copy(update={"reads": one.id in names, "groups": ()}) for one in brief.candidates)
        self.brief = brief.model_copy(update={"candidates": pool})

    def write(self, directory: Path) -> RouterManifest:
        from safetensors.torch import load_file

        from composer.mixture.fusion import build_fusion
        from routers.gated import WEIGHTS

        with TemporaryDirectory(prefix="model-composer-") as home:
            manifest = ROUTERS.get(self.section.router.kind).build(self.brief, Path(home))
            gate = load_file(Path(home) / WEIGHTS)
        assert manifest.encoder is not None  # noqa: S101 - these kinds read
        build_fusion(
            [one.checkpoint for one in self.experts],
            [one.id for one in self.experts].index(manifest.encoder.source),
            manifest.encoder.layers or 0,
            gate["weight"] / self.section.router.temperature,
            gate["bias"] / self.section.router.temperature,
            directory,
            top_k=self.section.top_k,
        )
        return manifest


class _Layers:
    """Layers, or their MLPs, of models of one shape in one of them."""

    def __init__(self, experts: Sequence[Expert], section: MixtureSection, brief: Brief, store: Store) -> None:
        self.experts, self.section, self.brief, self.store = experts, section, brief, store
        self.own = [one.checkpoint for one in experts]
        check_level(self._level, self.own, self.own[0])
        names = [one.id for one in experts]
        if section.dense not in ("average", *names):
            raise RecipeError(
                f"mixture.dense: '{section.dense}' is no expert{nearest(section.dense, names)} "
                f"(the experts are: {', '.join(names)}; or average)"
            )

    def write(self, directory: Path) -> RouterManifest:
        from composer.mixture.blocks import build_blocks
        from composer.mixture.ffn import build_ffn

        dense, settings = self._dense(), self.section.layers
        gates, manifest = self._gates(dense)
        build = build_blocks if self._level == "block" else build_ffn
        build(self.own, dense, gates, settings, directory)
        return manifest

    @property
    def _level(self) -> Level:
        return "ffn" if self.section.level == "ffn" else "block"

    def _dense(self) -> Checkpoint:
        if self.section.dense != "average":
            return next(one for one in self.own if one.id == self.section.dense)
        if len({one.content_hash for one in self.own}) == 1:
            return self.own[0]
        step = MergeStep(name="dense", operator="linear", inputs=tuple(one.id for one in self.own))
        return export(Merge(step, self.own, None, Shelf()), "dense", self.store)

    def _gates(self, dense: Checkpoint) -> tuple[Gates, RouterManifest]:
        import torch

        from routers.gated import GatedKind, check_examples, left_out, macro, shares_of, warnings_of

        kind = ROUTERS.get(self.section.router.kind)
        assert isinstance(kind, GatedKind)  # noqa: S101 - the settings let no other through
        check_examples(self.brief.candidates)
        texts = [text for one in self.experts for text in one.examples]
        labelled = self.brief.labelled if kind.gates.learns else ()
        shares = shares_of(self.brief.candidates, labelled)
        settings = self.section.layers
        seen = gate_inputs(dense.path, [*texts, *(one.text for one in labelled)], self._level, settings.dense_layers)
        if settings.shared_gate:
            seen = seen[:1]
        fitted = [kind.gates.fit(layer, shares) for layer in seen]
        weight = torch.stack([one["weight"] for one in fitted]) / self.section.router.temperature
        bias: Tensor | None = torch.stack([one["bias"] for one in fitted]) / self.section.router.temperature
        if self._level == "ffn":
            weight, bias = without_bias(weight, seen), None
        count = len(texts)
        pairs = [[one.pair for one in left_out(kind.gates, layer[:count], shares[:count])] for layer in seen]
        names = tuple(one.id for one in self.experts)
        confused = Counter(f"{names[a]} -> {names[b]}" for layer in pairs for a, b in layer if a != b)
        accuracy = sum(map(macro, pairs)) / len(pairs) if pairs[0] else None
        manifest = RouterManifest(
            kind=kind.name,
            experts=names,
            policy=self.brief.policy,
            leave_one_out=accuracy,
            learnt_from=len(labelled),
            warnings=warnings_of(self.brief.candidates, accuracy, confused, None),
        )
        return Gates(weight, bias), manifest


def without_bias(weight: "Tensor", seen: "Tensor") -> "Tensor":
    """Return gates that need no bias: nothing is left in them of the direction of the mean state.

    A state is its mean plus what tells it from others, and the bias of a gate takes the mean's share away: `W x - W m`.
    States have about the mean's share of the mean's direction, so taking the direction out of W does nearly the same.

    Args:
        weight: `[layers, experts, hidden]`.
        seen: `[layers, texts, hidden]`.
    """
    mean = seen.mean(dim=1, keepdim=True)
    along: Tensor = (weight * mean).sum(dim=-1, keepdim=True) / (mean**2).sum(dim=-1, keepdim=True).clamp_min(1e-12)
    return weight - along * mean
