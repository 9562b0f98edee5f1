"""The recipe's `zoo`."""

from typing import Self

from pydantic import Field, model_validator

from composer.settings import Identifier, PathText, Section


class ModelEntry(Section):
    """One checkpoint of the zoo."""

    id: Identifier
    """The model's name in reports and on the endpoint."""
    model: PathText
    """A local Hugging Face directory; relative paths start at the recipe, ${VARIABLES} are filled in."""
    examples: list[str] = []
    """Five to ten requests meant for this model; the router is initialised from them."""


class ZooSection(Section):
    """The checkpoints to compose."""

    models: list[ModelEntry] = Field(min_length=1)
    """The checkpoints; at least one."""
    base: PathText | None = None
    """The checkpoint they were fine-tuned from, for operators on task vectors; not itself a member."""
    trust_remote_code: bool = False
    """Whether checkpoints may run Python of their own. Only for code you have read."""

    @model_validator(mode="after")
    def _ids_are_unique(self) -> Self:
        ids = [entry.id for entry in self.models]
        twice = sorted({i for i in ids if ids.count(i) > 1})
        if twice:
            raise ValueError(f"two models have the id '{twice[0]}'; give each its own")
        return self
