"""The recipe's `probes`."""

from pydantic import Field

from composer.settings import PathText, Section


class ProbesSection(Section):
    """The unlabelled texts that models are run on to compare what they do."""

    texts: PathText = "default"
    """"default" for the texts that come with the program, or a file: one text a line, or JSON lines with "text"."""
    limit: int = Field(default=64, ge=1)
    """At most this many texts."""
    characters: int = Field(default=512, ge=32, le=65536)
    """At most this many characters of each text."""
