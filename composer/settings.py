"""What sections of a recipe are made of. Each room has a section of its own; `composer.recipe` puts them together."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema

from composer.errors import RecipeError
from composer.registry import Registry


class Section(BaseModel):
    """A part of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


def named(registry: Registry[Any], *extra: str) -> Any:
    """Return a string type that only takes names in `registry` (or one of `extra`)."""

    def check(name: str) -> str:
        if name in extra:
            return name
        try:
            return registry.check(name)
        except RecipeError as error:
            raise ValueError(str(error)) from None

    names = [*extra, *registry.names()]
    return Annotated[str, AfterValidator(check), WithJsonSchema({"type": "string", "enum": names})]


def _path(value: str) -> str:
    if not value.strip():
        raise ValueError("an empty path")
    return value


Identifier = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)]
PathText = Annotated[str, AfterValidator(_path), Field(json_schema_extra={"format": "path"})]
