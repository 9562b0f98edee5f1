"""What the licences of a composite's sources mean together. No legal advice: it says where to look."""

from collections.abc import Mapping

PERMISSIVE = ("apache-2.0", "mit", "bsd", "isc", "cc0", "cc-by-4.0", "cc-by-3.0", "unlicense", "odc-by", "wtfpl",
              "zlib", "artistic", "ms-pl", "postgresql", "ncsa", "cdla-permissive", "pddl")  # fmt: skip
"""Beginnings of licences that ask for attribution at most."""
ALIKE = ("cc-by-sa", "gpl", "agpl", "lgpl", "mpl", "epl", "eupl", "osl", "odbl", "cdla-sharing")
"""Beginnings of those whose works must be passed on under the same one."""


def licence_notes(licences: Mapping[str, str | None]) -> tuple[str, ...]:
    """Return what whoever passes a composite on should know.

    Args:
        licences: Of each source, by id, as model cards name them; None where none is stated.
    """
    found: dict[str, list[str]] = {}
    for name, licence in licences.items():
        found.setdefault((licence or "").lower().strip(), []).append(name)
    unknown = sorted(found.pop("", []))
    notes = []
    if unknown:
        notes.append(f"no licence is stated for {', '.join(unknown)}: without one, nothing may be passed on")
    closed = {one: names for one, names in found.items() if "-nc" in one or "noncommercial" in one}
    for licence, names in closed.items():
        notes.append(f"{licence} ({', '.join(sorted(names))}) forbids commercial use, of the whole composite too")
    alike = {one: names for one, names in found.items() if one.startswith(ALIKE)}
    own = {
        one: names for one, names in found.items()
        if one not in closed and one not in alike and not one.startswith(PERMISSIVE)
    }  # fmt: skip
    for licence, names in own.items():
        notes.append(f"{licence} ({', '.join(sorted(names))}) is a licence with terms of its own: read them")
    binding = {**alike, **closed, **own}
    if alike and len(binding) > 1:
        notes.append(f"conflict: what is made under one of {', '.join(sorted(binding))} may not satisfy the others")
    return tuple(notes)
