"""The composite: a manifest that is enough to rebuild or serve it."""

from pathlib import Path
from typing import Self

from composer.artefacts import Store
from composer.errors import ServeError, ZooError
from composer.value import Value
from composer.zoo.checkpoint import Checkpoint
from routers import RouterManifest

MANIFEST = "composite.json"


class Expert(Value):
    """One whole model of the mixture."""

    id: str
    checkpoint: Checkpoint
    members: tuple[str, ...]
    """The zoo's models it is made of."""
    examples: tuple[str, ...]
    """Requests meant for it: those of its members."""
    groups: tuple[int, ...] = ()
    """How many of them each member gave, in their order; empty if they are not the members'."""
    examples_from: str = "the recipe"
    """Where they come from."""
    reason: str
    """Why it is in the mixture, in one sentence."""

    @property
    def licences(self) -> dict[str, str | None]:
        """Licence of every model it is made of, by id."""
        lineage = self.checkpoint.lineage
        return dict(lineage.licences) if lineage and lineage.licences else {self.id: self.checkpoint.licence}


class Composite(Value):
    """What is served: experts, and the router between them."""

    name: str
    experts: tuple[Expert, ...]
    router: RouterManifest | None
    """None for a single expert, which answers everything."""
    gates: RouterManifest | None = None
    """How the gates inside a single expert that is itself a mixture were made."""
    left_out: dict[str, str] = {}
    """Models of the zoo that are in no expert, with the reason."""

    def __getitem__(self, name: str) -> Expert:
        return next(expert for expert in self.experts if expert.id == name)

    @property
    def parameters(self) -> int:
        """Parameters of all experts together."""
        return sum(expert.checkpoint.parameters for expert in self.experts)

    @property
    def active(self) -> tuple[int, int]:
        """Parameters that work on one answer, at least and at most."""
        each = [expert.checkpoint.parameters for expert in self.experts]
        return min(each), max(each)

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Read the composite in a directory; what lies in it is found wherever it has been moved to.

        Raises:
            ServeError: if there is none, or a relative path in it leads out of it.
        """
        file = directory / MANIFEST
        if not file.is_file():
            raise ServeError(f"{directory} holds no composite: there is no {MANIFEST}")
        found = cls.load(file)
        experts = []
        for expert in found.experts:
            path = Path(expert.checkpoint.path)
            if not path.is_absolute():
                path = directory / path
                if not path.resolve().is_relative_to(directory.resolve()):
                    raise ServeError(f"{file}: expert '{expert.id}' is at {expert.checkpoint.path}, outside of it")
            checkpoint = expert.checkpoint.model_copy(update={"path": str(path)})
            experts.append(expert.model_copy(update={"checkpoint": checkpoint}))
        changes: dict[str, object] = {"experts": tuple(experts)}
        encoder = found.router.encoder if found.router else None
        if found.router and encoder and encoder.source not in [one.id for one in experts]:
            own = directory / encoder.source
            if not Path(encoder.source).is_absolute() and own.is_dir():
                moved = encoder.model_copy(update={"source": str(own)})
                changes["router"] = found.router.model_copy(update={"encoder": moved})
        return found.model_copy(update=changes)

    def verify(self, store: Store) -> None:
        """Check that every expert is still what the composite was built with.

        Hashes are remembered by size and time, so files that have not changed are not read again. What the program
        keeps in its store is never rewritten, and only has to be there.

        Raises:
            ServeError: naming the expert, and the way out.
        """
        from composer.zoo import inspect_checkpoint

        for expert in self.experts:
            checkpoint = expert.checkpoint
            path = Path(checkpoint.path)
            if not path.is_dir():
                raise ServeError(f"expert '{expert.id}': {path} is gone; run the recipe again")
            if path.resolve().is_relative_to(store.root.resolve()):
                continue
            try:
                now = inspect_checkpoint(expert.id, path, store, trust_remote_code=checkpoint.remote_code)
            except ZooError as error:
                raise ServeError(f"expert '{expert.id}': {error}") from error
            if now.content_hash != checkpoint.content_hash:
                raise ServeError(
                    f"expert '{expert.id}': {path} has changed since the composite was built (content hash "
                    f"{now.content_hash[:12]}, was {checkpoint.content_hash[:12]}); run the recipe again"
                )
