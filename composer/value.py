"""The base of every typed value that passes between rooms."""

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict

from composer.artefacts import write_text


class Value(BaseModel):
    """An immutable, strictly typed record that can be saved as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def save(self, path: Path) -> Path:
        """Write the value to `path` atomically and return the path."""
        return write_text(path, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a value that `save` wrote."""
        return cls.model_validate_json(Path(path).read_text())
