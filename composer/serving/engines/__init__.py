"""Engines: existing servers that speak the OpenAI API; one process serves one expert, or several that can share it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from composer.registry import Registry

if TYPE_CHECKING:
    from composer.zoo.checkpoint import Checkpoint


@dataclass(frozen=True)
class EngineSettings:
    """What an engine is told when it starts."""

    port: int
    max_model_len: int
    dtype: str
    kv_cache_mb: int
    threads: int
    share: float
    """The part of a GPU's memory it may take, 0..1."""
    gpus: tuple[int, ...] = ()
    """The GPUs it runs on; empty on a CPU."""
    sleeps: bool = False
    """Whether it takes turns with others on its GPU."""
    secret: str = ""
    """What a request must bring as a bearer token, where the engine can ask for one."""


@dataclass(frozen=True)
class Seat:
    """Where and how an expert is asked."""

    url: str
    """Base address of its engine's API, with "/v1"."""
    model: str
    """What the engine calls it."""
    body: Mapping[str, Any] = field(default_factory=dict)
    """Added to each request."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Sent with each request."""
    engine: str = ""
    """The engine's name, which experts that share it have in common."""


class EngineKind(Protocol):
    """How one kind of engine is started."""

    name: str
    scores_prompts: bool
    """Whether `echo` with `logprobs` gives the log-probabilities of a prompt's tokens."""
    overhead: int
    """Bytes of RAM an engine takes beside weights and key-value cache."""

    def missing(self) -> str | None:
        """Return what is not installed and how to get it, or None."""
        ...

    def unsupported(self, checkpoint: "Checkpoint") -> str | None:
        """Return why this engine cannot serve a checkpoint, or None."""
        ...

    def command(self, checkpoint: "Checkpoint", settings: EngineSettings) -> list[str]:
        """Return the command line that serves a checkpoint on loopback."""
        ...

    def environment(self, settings: EngineSettings) -> dict[str, str]:
        """Return environment variables to set for it."""
        ...


ENGINES: Registry[EngineKind] = Registry("engine")
ENGINES.register("vllm", "composer.serving.engines.vllm:engine")
ENGINES.register("transformers", "composer.serving.engines.transformers:engine")
