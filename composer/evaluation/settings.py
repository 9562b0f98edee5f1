"""The recipe's `evaluate`."""

from typing import Annotated, Literal

from pydantic import Field

from composer.settings import PathText, Section

Scorer = Literal["torch", "vllm"]
"""What runs the models that are scored."""


class EvaluateSection(Section):
    """The tasks that judge the composition."""

    tasks: list[str] = Field(min_length=1)
    """lm-eval task names."""
    weights: dict[str, Annotated[float, Field(gt=0)]] = {}
    """How much single tasks count in the mean over tasks that merges are chosen by, and in the report's: 2 for twice.
    Tasks that are not named count once."""
    include: PathText | None = None
    """A folder with task YAMLs of your own."""
    proxy: float = Field(default=0.5, gt=0, lt=1)
    """Share of items used for choosing, where a task has one split only; it is decided by a hash of the item.
    A task with validation and test splits gives them as proxy and held-out."""
    proxy_limit: Annotated[int, Field(ge=1)] | None = None
    """At most this many proxy items a task."""
    held_out_limit: Annotated[int, Field(ge=1)] | None = None
    """At most this many held-out items a task."""
    batch_size: int = Field(default=16, ge=1)
    """Items scored at once."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """What models are computed in when they are scored in this process; by default float32 on a CPU, the type that
    their weights are stored in on a GPU. bfloat16 takes half the time on CPUs that have instructions for it, and
    rounds what is merged to its 8 bits, whatever `merge.dtype` is."""
    scorer: Literal["auto", Scorer] = "auto"
    """What candidates of a merge search, and the models they are compared with there, are scored by: `torch` in this
    process, or `vllm`, one engine whose weights are exchanged. `auto` takes vLLM where it is installed, knows the model
    and has a GPU; on CPUs it generates faster, but scores choices slower. Everything else is scored by torch."""
    sandbox: bool = False
    """Whether tasks may run code that models write. It runs in a sandbox without network, files or rights, which takes
    Linux with user namespaces; tasks must be written for it."""
    seed: int = 0
    """Seed of the split and of the bootstrap."""
