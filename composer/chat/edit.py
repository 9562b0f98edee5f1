"""What a request changes: the arguments of the tool that drafts recipes, whoever calls it."""

from typing import Annotated, Literal

from pydantic import Field

from composer.value import Value

Limit = Literal["size", "time", "memory", "disk", "items", "protect", "weights", "threshold", "all"]


class Edit(Value):
    """Changes to the draft of a recipe. What is left out stays as it is; models and tasks are given by their ids."""

    fresh: bool = Field(default=False, description="Begin again from the zoo's own recipe.")
    name: str | None = Field(default=None, description="What the composite is called.")
    models: tuple[str, ...] | None = Field(default=None, description="Exactly these models, by id.")
    add: tuple[str, ...] = Field(default=(), description="Models to take in besides.")
    leave_out: tuple[str, ...] = Field(default=(), description="Models to leave out.")
    whole: tuple[str, ...] = Field(default=(), description="Models that stay whole experts, merged with nothing.")
    strategy: str | None = Field(default=None, description="How merges are searched for; 'none' merges nothing.")
    operators: tuple[str, ...] = Field(default=(), description="What is merged with.")
    tries: int | None = Field(default=None, description="Candidates to try (evolution, simmerge, bandit).")
    accept: Literal["proxy", "always"] | None = Field(default=None, description="Keep merges that gain, or all.")
    seed: int | None = Field(default=None, description="Seed of the search.")
    threshold: float | None = Field(default=None, description="Least similarity of models that may be merged.")
    signal: str | None = Field(default=None, description="What models are compared by.")
    level: str | None = Field(default=None, description="Mix whole models, blocks or ffn parts.")
    router: str | None = Field(default=None, description="Kind of router.")
    preset: str | None = Field(default=None, description="Router preset: accurate, balanced or fast.")
    tasks: tuple[str, ...] | None = Field(default=None, description="Exactly these tasks judge the composite.")
    add_tasks: tuple[str, ...] = Field(default=(), description="Tasks that judge it besides.")
    protect: tuple[str, ...] = Field(default=(), description="Tasks on which no merge may lose.")
    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={}, description="How much single tasks count in the mean that merges are chosen by; 1 for once."
    )
    unprotect: tuple[str, ...] = Field(default=(), description="Tasks that need no protection any more.")
    max_parameters: int | None = Field(default=None, description="Parameters of all experts together, at most.")
    minutes: float | None = Field(default=None, description="The plan may take so long.")
    memory_gb: float | None = Field(default=None, description="The plan may need so much RAM.")
    disk_gb: float | None = Field(default=None, description="The plan may write so much.")
    proxy_items: int | None = Field(default=None, description="Items a task for choosing.")
    held_out_items: int | None = Field(default=None, description="Items a task for the report.")
    engine: str | None = Field(default=None, description="The serving engine.")
    port: int | None = Field(default=None, description="The endpoint's port.")
    serve: bool | None = Field(default=None, description="Whether the endpoint stays up after the run.")
    forget: tuple[Limit, ...] = Field(default=(), description="Limits that no longer hold.")

    @property
    def empty(self) -> bool:
        """Whether it changes nothing."""
        return self == Edit()
