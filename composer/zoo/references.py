"""What people call a model, and the files that stand behind it."""

from pathlib import Path
from typing import Literal

from composer.errors import ZooError
from composer.progress import Progress, silent
from composer.value import Value
from composer.zoo import adapters, hub


class ModelReference(Value):
    """A model as a recipe or a command names it."""

    model: str
    """A local directory, a GGUF file, or a hub id ("owner/name", perhaps with "@revision")."""
    revision: str | None = None
    """A branch, tag or commit of the hub repository."""
    file: str | None = None
    """The GGUF file, in a directory or repository of several."""
    adapter: str | None = None
    """A LoRA adapter to fold in: a local directory or a hub id."""

    def __str__(self) -> str:
        name = self.model + (f"@{self.revision}" if self.revision else "") + (f"/{self.file}" if self.file else "")
        return f"{name} + {self.adapter}" if self.adapter else name

    @property
    def repository(self) -> tuple[str, str | None] | None:
        """The hub repository and revision it stands for, or None if it is local."""
        return _repository(self.model, self.revision)


class Source(Value):
    """Where the weights of a checkpoint are."""

    kind: Literal["directory", "gguf"]
    path: str
    """The Hugging Face directory, or the GGUF file."""
    adapter: str | None = None
    """The directory of the LoRA adapter folded in."""

    @property
    def whole(self) -> bool:
        """Whether it is an ordinary Hugging Face directory as it stands."""
        return self.kind == "directory" and self.adapter is None


def absolute(text: str, folder: Path) -> str:
    """Return a model's path made absolute; what has the form of a hub id and is no path here stays as it is."""
    path = Path(text).expanduser()
    path = path if path.is_absolute() else (folder / path).resolve()
    return text if hub.is_hub_id(text) and not path.exists() else str(path)


def locate(reference: ModelReference, *, code: bool = False, progress: Progress = silent) -> Source:
    """Find the files of a model, downloading them if they are on the hub.

    A directory that holds only an adapter stands for its base with the adapter folded in.

    Args:
        reference: What is to be found.
        code: Whether the recipe allows the model to bring Python code of its own.
        progress: Told of downloads.

    Raises:
        ZooError: if there is no such model.
    """
    path = _local(reference.model, reference.revision, reference.file, code, progress)
    adapter = None
    if reference.adapter is not None:
        adapter = str(_local(reference.adapter, None, None, False, progress))
    elif path.is_dir() and (path / adapters.CONFIG).is_file() and not (path / "config.json").is_file():
        adapter, path = str(path), _base_of(path, progress)
    if path.is_dir():
        path = _gguf_in(path, reference.file) or path
    kind: Literal["directory", "gguf"] = "gguf" if path.is_file() else "directory"
    if kind == "gguf" and path.suffix != ".gguf":
        raise ZooError(f"{path} is a file of a kind nobody here knows; give a directory or a GGUF file")
    return Source(kind=kind, path=str(path), adapter=adapter)


def downloads(reference: ModelReference) -> dict[str, int]:
    """Return the bytes that `locate` would download, by repository (and file); empty if nothing is missing.

    Raises:
        ZooError: if the hub cannot say.
    """
    missing = {}
    for text, revision, file in (
        (reference.model, reference.revision, reference.file),
        (reference.adapter, None, None),
    ):
        found = _repository(text, revision) if text else None
        if found:
            size = hub.missing_bytes(*found, file=file)
            if size:
                missing["/".join(filter(None, ("@".join(filter(None, found)), file)))] = size
    return missing


def _repository(text: str, revision: str | None) -> tuple[str, str | None] | None:
    if not hub.is_hub_id(text) or Path(text).exists():
        return None
    identifier, _, said = text.partition("@")
    return identifier, revision or said or None


def _local(text: str, revision: str | None, file: str | None, code: bool, progress: Progress) -> Path:
    found = _repository(text, revision)
    if found:
        return hub.fetch(*found, file=file, code=code, progress=progress)
    path = Path(text)
    if not path.exists():
        raise ZooError(f"{path} does not exist; give a local directory, a GGUF file or a hub id")
    return path.resolve()


def _gguf_in(directory: Path, file: str | None) -> Path | None:
    """Return the GGUF file that a directory stands for, or None if it stands for itself."""
    files = sorted(directory.glob("*.gguf"))
    if file is not None:
        if not (directory / file).is_file():
            known = ", ".join(one.name for one in files) or "none"
            raise ZooError(f"{directory} has no file '{file}' (its GGUF files: {known})")
        return directory / file
    if not files or any(directory.glob("*.safetensors")):
        return None
    if len(files) > 1:
        names = ", ".join(one.name for one in files)
        raise ZooError(f"{directory} holds several GGUF files; name one with file: ({names})")
    return files[0]


def _base_of(adapter: Path, progress: Progress) -> Path:
    said = adapters.adapter_config(adapter).get("base_model_name_or_path")
    if not said:
        raise ZooError(f"{adapter} is an adapter that does not say its base; give model and adapter")
    try:
        return _local(absolute(str(said), adapter), None, None, False, progress)
    except ZooError as error:
        raise ZooError(
            f"{error} (it is the base that the adapter {adapter} names; or give model and adapter)"
        ) from None
