"""Which engines there are to be, who sits in which, and what each may take of the machine."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from composer.errors import ServeError
from composer.mixture.composite import Composite, Expert
from composer.serving import colocated
from composer.serving.engines import ENGINES, EngineKind, EngineSettings
from composer.serving.engines.machine import Gpu, cores, gpus, has_gpu
from composer.serving.settings import ServeSection
from composer.zoo import Checkpoint
from composer.zoo.adapters import adapter_config

DEFAULT_LENGTH = 4096
"""Longest sequence in tokens where neither recipe nor checkpoint say less."""
PACKED = 1.4
"""Memory of weights on a CPU, over their size: kernels keep packed copies of embedding and output head."""
GPU_PART = 0.9
"""The part of a GPU's memory that all engines on it together may take."""
GPU_LEAST = 2 << 30
"""Bytes an engine needs on a GPU beside its weights: its context, workspace and a small key-value cache."""
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM can be told as the highest rank of adapters."""


@dataclass(frozen=True)
class Share:
    """What an engine gets of the GPUs."""

    gpus: tuple[int, ...] = ()
    part: float = 0.0
    """Of each one's memory."""
    sleeps: bool = False
    """Whether it takes turns with others."""


@dataclass(frozen=True)
class Place:
    """One engine to be."""

    name: str
    """What logs and metrics call it: the expert's id, or those of all that share it."""
    kind: EngineKind
    checkpoint: Checkpoint
    """What it is started with."""
    experts: tuple[str, ...]
    max_model_len: int
    models: dict[str, str]
    """What it calls each expert."""
    bodies: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What each expert's requests must hold."""
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    weights: int = 0
    """Bytes of weights in memory."""
    share: Share = Share()
    note: str | None = None
    """Why it is not what one would expect."""

    def memory(self, kv_cache_mb: int) -> int:
        """Return about how many bytes of RAM it takes on a CPU."""
        return int(self.weights * PACKED) + (kv_cache_mb << 20) + self.kind.overhead

    def command(self, settings: EngineSettings) -> list[str]:
        """Return the command line."""
        return [*self.kind.command(self.checkpoint, settings), *self.arguments]


def places_of(composite: Composite, section: ServeSection) -> list[Place]:
    """Return the engines to start, in order.

    Raises:
        ServeError: if an expert cannot be served, naming it, or `remote` names what is none.
    """
    unknown = set(section.remote) - {expert.id for expert in composite.experts}
    if unknown:
        raise ServeError(f"serve.remote names '{sorted(unknown)[0]}', which is no expert of {composite.name}")
    own = [expert for expert in composite.experts if expert.id not in section.remote]
    alone = [_alone(expert, section) for expert in own]
    by_adapter = _sharing_base(own, alone, section) if section.colocate != "never" else []
    shared = {name for place in by_adapter for name in place.experts}
    rest = [place for place in alone if place.experts[0] not in shared]
    if section.colocate == "always" or (section.colocate == "auto" and not fits([*by_adapter, *rest], section)):
        rest = _together(rest, section)
    return _on_machine([*by_adapter, *rest])


def fits(places: Sequence[Place], section: ServeSection) -> bool:
    """Return whether engines find room on this machine as it is now."""
    if has_gpu():
        found = gpus()
        return not found or not any(share.sleeps for share in on_gpus([place.weights for place in places], found))
    return sum(place.memory(section.kv_cache_mb) for place in places) <= psutil.virtual_memory().available


def on_gpus(sizes: Sequence[int], machine: Sequence[Gpu]) -> list[Share]:
    """Share GPUs out: the largest model first, to the GPU with most room; what is larger than one GPU, over several.

    What is left of a GPU's memory is split evenly among its engines. Where there is no room for all, those on the GPU
    in question take turns.

    Args:
        sizes: Bytes of weights of each engine.
        machine: The GPUs.
    """
    room = {gpu.index: min(gpu.free, int(gpu.total * GPU_PART)) for gpu in machine}
    totals = {gpu.index: gpu.total for gpu in machine}
    seats: dict[int, tuple[int, ...]] = {}
    needs: dict[int, int] = {}
    for place in sorted(range(len(sizes)), key=lambda one: -sizes[one]):
        need, width = sizes[place] + GPU_LEAST, 1
        while need > min(totals.values()) * GPU_PART and width * 2 <= len(totals):
            width *= 2
            need = sizes[place] // width + GPU_LEAST
        chosen = tuple(sorted(sorted(room, key=lambda index: -room[index])[:width]))
        seats[place], needs[place] = chosen, need
        for index in chosen:
            room[index] -= need
    shares = []
    for place in range(len(sizes)):
        chosen = seats[place]
        if any(room[index] < 0 for index in chosen):
            shares.append(Share(chosen, GPU_PART, sleeps=True))
            continue
        spare = min(room[index] // sum(index in other for other in seats.values()) for index in chosen)
        shares.append(Share(chosen, min((needs[place] + spare) / totals[index] for index in chosen)))
    return shares


def _on_machine(places: list[Place]) -> list[Place]:
    found = gpus()
    if not found:
        return places
    return [
        replace(place, share=share)
        for place, share in zip(places, on_gpus([one.weights for one in places], found), strict=True)
    ]


def _alone(expert: Expert, section: ServeSection) -> Place:
    kind, note = _engine(expert, section.engine)
    checkpoint = expert.checkpoint.renamed(expert.id)
    return Place(
        name=expert.id,
        kind=kind,
        checkpoint=checkpoint,
        experts=(expert.id,),
        max_model_len=longest(checkpoint, section),
        models={expert.id: checkpoint.id if kind.name == "vllm" else checkpoint.path},
        weights=checkpoint.parameters * _bytes(checkpoint, section),
        note=note,
    )


def _engine(expert: Expert, wanted: str) -> tuple[EngineKind, str | None]:
    """Return the engine for an expert, and a note if it is not the usual one."""
    reasons: list[str] = []
    for name in ["vllm", "transformers"] if wanted == "auto" else [wanted]:
        kind = ENGINES.get(name)
        obstacle = kind.missing() or kind.unsupported(expert.checkpoint)
        if obstacle is None:
            return kind, "; ".join(reasons) or None
        reasons.append(obstacle)
    raise ServeError(f"expert '{expert.id}' cannot be served: {'; '.join(reasons)}")


def _bytes(checkpoint: Checkpoint, section: ServeSection) -> int:
    """Return bytes per parameter in memory."""
    return {"float32": 4, "float16": 2, "bfloat16": 2}.get(dtype_of(section), 4 if checkpoint.dtype == "F32" else 2)


def longest(checkpoint: Checkpoint, section: ServeSection) -> int:
    """Return the longest sequence that a checkpoint is served with, in tokens."""
    return min(checkpoint.context_length or DEFAULT_LENGTH, section.max_model_len or DEFAULT_LENGTH)


def dtype_of(section: ServeSection) -> str:
    """Return what engines compute in."""
    return "float32" if section.dtype == "auto" and not has_gpu() else section.dtype


def _sharing_base(experts: Sequence[Expert], alone: Sequence[Place], section: ServeSection) -> list[Place]:
    """Return engines of two or more experts that are adapters of one base, or that base itself (vLLM's multi-LoRA)."""
    groups: dict[str, list[Expert]] = {}
    for expert, place in zip(experts, alone, strict=True):
        home = _base_of(expert.checkpoint)
        if home is not None and place.kind.name == "vllm":
            groups.setdefault(home, []).append(expert)
    found = []
    for home, members in groups.items():
        adapters = {one.id: one.checkpoint.source.adapter for one in members if one.checkpoint.source.adapter}
        if len(members) < 2 or not adapters:
            continue
        first = next(place for place in alone if place.experts[0] == members[0].id)
        bare = next((one.id for one in members if one.id not in adapters), None)
        ranks = [int(adapter_config(Path(path))["r"]) for path in adapters.values()]
        base = first.checkpoint.model_copy(update={"path": home, "id": bare or f"base-of-{members[0].id}"})
        modules = [json.dumps({"name": name, "path": path}) for name, path in adapters.items()]
        found.append(
            replace(
                first,
                name="+".join(one.id for one in members),
                checkpoint=base,
                experts=tuple(one.id for one in members),
                models={one.id: one.id for one in members},
                arguments=(
                    "--enable-lora",
                    "--max-loras",
                    str(len(adapters)),
                    "--max-lora-rank",
                    str(next(rank for rank in RANKS if rank >= max(ranks))),
                    "--lora-modules",
                    *modules,
                ),
                note="adapters of one base share an engine",
            )
        )
    return found


def _base_of(checkpoint: Checkpoint) -> str | None:
    """Return the directory of the base that vLLM could load a model as an adapter of; its own, if it has none."""
    source = checkpoint.source
    if source.kind != "directory" or checkpoint.lineage is not None:
        return None
    if source.adapter is None:
        return str(Path(source.path).resolve())
    config = adapter_config(Path(source.adapter))
    # What vLLM has no adapters for: other kinds than plain LoRA, whole modules, vocabularies, tokenizers of their own.
    other = any(config.get(key) for key in ("use_dora", "modules_to_save", "rank_pattern"))
    other = other or config.get("bias", "none") != "none" or checkpoint.tokenizer_home != checkpoint.home
    vocabulary = {"embed_tokens", "lm_head"} & set(config.get("target_modules") or ())
    return None if other or vocabulary or int(config["r"]) > RANKS[-1] else str(Path(source.path).resolve())


def _together(places: Sequence[Place], section: ServeSection) -> list[Place]:
    """Put models of one shape and tokenizer into one engine."""
    groups: list[list[Place]] = []
    for place in places:
        for group in groups:
            both = [*group, place]
            checkpoints = [one.checkpoint for one in both]
            if any(one.kind.name != "vllm" for one in both):
                continue
            if colocated.obstacle(checkpoints, dtype_of(section)) is None:
                group.append(place)
                break
        else:
            groups.append([place])
    found = []
    for group in groups:
        if len(group) == 1:
            found += group
            continue
        checkpoints = [one.checkpoint for one in group]
        experts = tuple(one.experts[0] for one in group)
        separate = sum(one.memory(section.kv_cache_mb) for one in group)
        place = replace(
            group[0],
            name="+".join(experts),
            experts=experts,
            max_model_len=min(one.max_model_len for one in group),
            models=dict.fromkeys(experts, group[0].models[experts[0]]),
            bodies={name: colocated.request(number) for number, name in enumerate(experts)},
            arguments=tuple(colocated.arguments(checkpoints)),
            environment=colocated.environment(),
            weights=sum(one.weights for one in group),
        )
        saved = separate - place.memory(section.kv_cache_mb)
        found.append(replace(place, note=f"{len(group)} experts share an engine, which saves {saved / 1e9:.1f} GB"))
    return found


def threads_for(engines: int) -> int:
    """Return the CPU threads of each of some engines."""
    return max(1, cores() // max(engines, 1))
