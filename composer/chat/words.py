"""Text to words: what is cut off before anything is understood."""

import re
import unicodedata
from typing import Literal, cast

from composer.errors import RecipeError
from composer.value import Value

LONGEST = 4000
"""Characters of a message, at most: a request is a sentence or a few, not a document."""

Kind = Literal["quoted", "path", "number", "word", "mark"]

_WORD = re.compile(
    r"""
    (?P<quoted>  "[^"]*" | '[^']{2,}'(?!\w) | “[^”]*” | `[^`]*` )
  | (?P<path>    (?:~|\.{1,2})?/[^\s,;"']+ | [A-Za-z]:\\[^\s,;"']+ | [\w.-]+\.ya?ml\b | \w[\w.-]*/[\w./@-]+ )
  | (?P<number>  \d+(?:[.,]\d+)* (?:[kKmMbB]\b|\ ?%)? (?![\w-]) )
  | (?P<word>    [^\W_](?:[\w'’.+-]*[\w+])? )
  | (?P<mark>    [,;.!?:&()] )
    """,
    re.VERBOSE,
)


class Word(Value):
    """One word of a message, or a number, a path, something in quotation marks, a punctuation mark."""

    kind: Kind
    text: str
    """As it was written."""
    at: int = 0
    """Where it begins in the message."""

    @property
    def plain(self) -> str:
        """In lower case, with plain apostrophes."""
        return self.text.lower().replace("’", "'")


def clean(message: str) -> str:
    """Return a message as plain text on one line: without control characters, in one Unicode form.

    Raises:
        RecipeError: if it is longer than a request can be.
    """
    if len(message) > LONGEST:
        raise RecipeError(f"a message of {len(message):,} characters; at most {LONGEST:,} are read. Say it shorter")
    text = unicodedata.normalize("NFKC", message)
    text = "".join(" " if unicodedata.category(one)[0] in "CZ" else one for one in text)
    return " ".join(text.split())


def words_of(text: str) -> list[Word]:
    """Cut a cleaned message into words; what is none of them (smileys, stray signs) is passed over."""
    return [Word(kind=cast("Kind", one.lastgroup), text=one[0], at=one.start()) for one in _WORD.finditer(text)]


def distance(first: str, second: str) -> int:
    """Return how many letters must be changed, added, dropped or swapped with the next one.

    Optimal string alignment (Boytsov, ACM Journal of Experimental Algorithmics 16, 2011).
    """
    rows = [list(range(len(second) + 1))]
    for i, a in enumerate(first, start=1):
        row = [i]
        for j, b in enumerate(second, start=1):
            best = min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (a != b))
            if i > 1 and j > 1 and a == second[j - 2] and first[i - 2] == b:
                best = min(best, rows[-2][j - 2] + 1)
            row.append(best)
        rows.append(row)
    return rows[-1][-1]


def misspelt(written: str, meant: str) -> int | None:
    """Return the distance if `written` may be `meant` with slips, else None.

    Short words are often other words: of three letters two may be swapped, of four one added or dropped, none replaced.
    """
    shorter = min(len(written), len(meant))
    if shorter < 3 or abs(len(written) - len(meant)) > 2:
        return None
    found = distance(written, meant)
    swapped = len(written) == len(meant) and sorted(written) == sorted(meant)
    swapped = swapped or set(written) == set(meant)  # a letter twice
    if not swapped and (shorter == 3 or (shorter == 4 and len(written) == len(meant))):
        return 0 if found == 0 else None
    return found if found <= (2 if shorter >= 7 else 1) else None
