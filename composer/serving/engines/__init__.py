"""Engines: existing servers that speak the OpenAI API, one process per expert."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

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


class EngineKind(Protocol):
    """How one kind of engine is started."""

    name: str
    scores_prompts: bool
    """Whether `echo` with `logprobs` gives the log-probabilities of a prompt's tokens."""

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
