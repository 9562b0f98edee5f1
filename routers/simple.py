"""Routers that do not read: `fixed`, `random` and `oracle`, to compare others with."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from composer.errors import RouterError
from routers import Brief, Candidate, Decision, Router, RouterManifest

KNOWN = "oracle.json"

Choose = Callable[[str], str]


@dataclass
class SimpleRouter:
    """A router that knows the expert of a text without scores."""

    manifest: RouterManifest
    choose: Choose

    def route(self, text: str) -> Decision:
        """Return the expert for one text."""
        expert = self.choose(text)
        scores = {name: float(name == expert) for name in self.manifest.experts}
        return Decision(expert=expert, scores=scores, confidence=1.0, margin=1.0, reason=self.manifest.kind)


class Fixed:
    """Everything goes to the fallback."""

    name = "fixed"

    def build(self, brief: Brief, directory: Path) -> RouterManifest:
        """Return the manifest; there is nothing to write."""
        names = tuple(one.id for one in brief.candidates)
        return RouterManifest(kind=self.name, experts=names, policy=brief.policy)

    def load(self, manifest: RouterManifest, directory: Path, candidates: tuple[Candidate, ...]) -> Router:
        """Load it."""
        return SimpleRouter(manifest, lambda text: manifest.policy.abstain_to)


class Random(Fixed):
    """Any expert with the same probability, decided by a hash of the text: the same text, the same expert."""

    name = "random"

    def load(self, manifest: RouterManifest, directory: Path, candidates: tuple[Candidate, ...]) -> Router:
        """Load it."""
        return SimpleRouter(manifest, lambda text: manifest.experts[_hash(text) % len(manifest.experts)])


class Oracle(Fixed):
    """The expert that a labelled text should go to; everything else goes to the fallback."""

    name = "oracle"

    def build(self, brief: Brief, directory: Path) -> RouterManifest:
        """Write down what is known.

        Raises:
            RouterError: if nothing is.
        """
        if not brief.labelled:
            raise RouterError("router 'oracle' needs labelled texts: mixture.router.learn_from: proxy, or a file")
        known = {str(_hash(one.text)): max(one.shares, key=lambda name: one.shares[name]) for one in brief.labelled}
        (directory / KNOWN).write_text(json.dumps(known))
        return super().build(brief, directory).model_copy(update={"learnt_from": len(known)})

    def load(self, manifest: RouterManifest, directory: Path, candidates: tuple[Candidate, ...]) -> Router:
        """Load it."""
        known: dict[str, str] = json.loads((directory / KNOWN).read_text())
        return SimpleRouter(manifest, lambda text: known.get(str(_hash(text)), manifest.policy.abstain_to))


def _hash(text: str) -> int:
    return int.from_bytes(sha256(text.encode()).digest()[:8])


fixed, random, oracle = Fixed(), Random(), Oracle()
