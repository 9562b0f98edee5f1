"""Names as people say them: "the math model" for stories-math, "maths", "stories math", "sotries-math"."""

import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher

from composer.chat.words import misspelt

_ENDING = re.compile(r"(ing|ed|er|e)s?$")


def parts(name: str) -> list[str]:
    """Return the words that a name is put together from."""
    return [part for part in re.split(r"[-_./\s]+", name.lower()) if part]


def matching(said: str, known: Iterable[str]) -> tuple[str, ...]:
    """Return all of `known` that somebody may have meant: those that are nearest in the first way that finds any.

    In order: the name itself; a name that holds all that was said, word by word; the same with endings that do not
    matter ("maths", "mathematics"); the same with slips of the pen.
    """
    known = list(known)
    wanted = parts(said)
    if not wanted:
        return ()
    exact = tuple(name for name in known if parts(name) == wanted)
    if exact:
        return exact
    for alike in (str.__eq__, _same_stem, lambda a, b: misspelt(a, b) is not None):
        found = tuple(name for name in known if all(any(alike(one, part) for part in parts(name)) for one in wanted))
        if found:
            return found
    glued = "".join(wanted)
    return tuple(name for name in known if misspelt(glued, "".join(parts(name))) is not None)


def _same_stem(said: str, part: str) -> bool:
    """Return whether two words differ by an ending: the shorter one, of four letters at least, begins the other.

    Or both have one: "coding" and "code".
    """
    shorter, longer = sorted((said, part), key=len)
    stems = {_ENDING.sub("", one) for one in (said, part)}
    if len(stems) == 1 and len(stems.pop()) >= 3:
        return True
    return longer in (f"{shorter}s", f"{shorter}es") or (len(shorter) >= 4 and longer.startswith(shorter))


def nearest_names(said: str, known: Sequence[str], count: int = 3) -> tuple[str, ...]:
    """Return the names that look most like what was said, the nearest first."""

    def likeness(name: str) -> float:
        return max(SequenceMatcher(None, said.lower(), one).ratio() for one in (name.lower(), *parts(name)))

    return tuple(sorted(known, key=lambda name: -likeness(name))[:count])
