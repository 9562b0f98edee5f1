"""The recipe's `zoo`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from composer.settings import Identifier, PathText, Section
from composer.zoo.references import ModelReference


class ModelEntry(Section):
    """One checkpoint of the zoo."""

    id: Identifier
    """The model's name in reports and on the endpoint."""
    model: PathText
    """A Hugging Face directory, a GGUF file or a hub id ("owner/name"); relative paths start at the recipe,
    ${VARIABLES} are filled in."""
    revision: str | None = None
    """A branch, tag or commit, for a hub id."""
    file: str | None = None
    """The GGUF file, in a directory or hub repository that holds several."""
    adapter: PathText | None = None
    """A LoRA adapter to fold in, written like model."""
    parameters: int | None = Field(default=None, ge=1)
    """How many it has; only for `plan`, which goes by it while neither the model nor the hub can be asked."""
    examples: list[str] = []
    """Five to ten requests meant for this model; the router is initialised from them."""

    @property
    def reference(self) -> ModelReference:
        """What it refers to."""
        return ModelReference(model=self.model, revision=self.revision, file=self.file, adapter=self.adapter)


class ZooSection(Section):
    """The checkpoints to compose."""

    models: list[ModelEntry] = Field(min_length=1)
    """The checkpoints; at least one."""
    base: PathText | None = None
    """The checkpoint they were fine-tuned from, written like model, for task vectors; not itself a member."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do about a checkpoint that cannot be used: stop, or go on without it and list it in the report."""
    trust_remote_code: bool = False
    """Whether checkpoints may run Python of their own. Only for code you have read."""

    @model_validator(mode="after")
    def _ids_are_unique(self) -> Self:
        ids = [entry.id for entry in self.models]
        twice = sorted({i for i in ids if ids.count(i) > 1})
        if twice:
            raise ValueError(f"two models have the id '{twice[0]}'; give each its own")
        return self
