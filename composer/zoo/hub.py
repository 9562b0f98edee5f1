"""The Hugging Face Hub: fetching the files of a checkpoint that are needed, and no others.

All requests go through huggingface_hub, so its settings hold: HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE.
Interrupted downloads are taken up where they stopped.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from composer.errors import DiskFullError, ZooError, first_line, is_disk_full
from composer.progress import Progress, Step, silent
from composer.zoo.weights import INDEX, TensorHeader, index_shards

DESCRIPTION = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "adapter_config.json",
    "README.md",
    "LICENSE*",
    "LICENCE*",
    INDEX,
)
"""Small files that describe a checkpoint."""

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?$")


def is_hub_id(text: str) -> bool:
    """Return whether a text has the form of a hub id, "owner/name", perhaps with "@revision"."""
    return bool(_HUB_ID.match(text)) and not text.endswith((".gguf", ".safetensors", ".json"))


def fetch(
    repository: str,
    revision: str | None = None,
    *,
    file: str | None = None,
    code: bool = False,
    weights: bool = True,
    progress: Progress = silent,
) -> Path:
    """Return the local directory of a hub repository, downloading what is missing.

    Args:
        repository: "owner/name".
        revision: A branch, tag or commit; by default "main".
        file: The GGUF file wanted, in a repository of several.
        code: Whether Python files are wanted too.
        weights: Whether weights are wanted, or only what describes them.
        progress: Told of the bytes.

    Raises:
        ZooError: if the hub cannot be reached and the files are not in its cache, or there is no such repository,
            revision or file.
        DiskFullError: if there is no room.
    """
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {"revision": revision, "tqdm_class": _bar(repository, progress)}
    with _hub_errors(repository, revision):
        names = _names(repository, revision)  # what is listed decides what is fetched
        if names is None:  # what was fetched before still serves
            return _cached(repository, revision, weights)
        wanted = _descriptions(names)
        if code:
            wanted += [name for name in names if name.endswith(".py") and "/" not in name]
        if weights:
            if INDEX in names:
                folder = Path(snapshot_download(repository, allow_patterns=[_literal(INDEX)], **options))
                wanted += index_shards(folder / INDEX)
            else:
                wanted += _weight_names(repository, names, file)
        return Path(snapshot_download(repository, allow_patterns=[_literal(name) for name in wanted], **options))


def remote_headers(repository: str, revision: str | None = None) -> dict[str, TensorHeader]:
    """Return the tensors of a repository from the headers of its files, read by range; no weight is downloaded.

    Raises:
        ZooError: as `fetch`, or if it has no safetensors weights.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    headers: dict[str, TensorHeader] = {}
    with _hub_errors(repository, revision):
        try:
            metadata = HfApi().get_safetensors_metadata(repository, revision=revision)
        except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
            raise ZooError(f"{repository}: its weights are not readable safetensors: {first_line(error)}") from None
    for file, one in metadata.files_metadata.items():
        for name, tensor in one.tensors.items():
            headers[name] = TensorHeader(file=file, dtype=tensor.dtype, shape=tuple(tensor.shape))
    return dict(sorted(headers.items()))


def missing_bytes(repository: str, revision: str | None = None, *, file: str | None = None) -> int:
    """Return how many bytes `fetch` would download.

    Raises:
        ZooError: as `fetch`.
    """
    from huggingface_hub import snapshot_download

    with _hub_errors(repository, revision):
        names = _names(repository, revision)
        if names is None:
            _cached(repository, revision, weights=True)
            return 0
        wanted = _descriptions(names) + _weight_names(repository, names, file)
        files = snapshot_download(
            repository, revision=revision, allow_patterns=[_literal(name) for name in wanted], dry_run=True
        )
        return sum(int(one.file_size or 0) for one in files if one.will_download)


def _cached(repository: str, revision: str | None, weights: bool) -> Path:
    """Return where a repository was downloaded to before, without asking the hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        # It counts as incomplete since the repository has more files than we ever want.
        path = getattr(error, "snapshot_path", None)
        if path is None or (weights and not [*Path(path).glob("*.safetensors"), *Path(path).glob("*.gguf")]):
            raise
        return Path(path)


def _names(repository: str, revision: str | None) -> list[str] | None:
    """Return the files of a repository, or None if the hub does not answer."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return [sibling.rfilename for sibling in HfApi().model_info(repository, revision=revision).siblings or []]
    except HfHubHTTPError:  # an answer, though not the one hoped for
        raise
    except _unreachable():
        return None


def _descriptions(names: list[str]) -> list[str]:
    return [name for name in names if any(fnmatch(name, pattern) for pattern in DESCRIPTION)]


def _weight_names(repository: str, names: list[str], file: str | None) -> list[str]:
    """Return the names of the weight files wanted, of all in a repository."""
    if file is not None:
        if file not in names:
            raise ZooError(f"{repository}: there is no file '{file}' (its GGUF files: {_few(_gguf(names))})")
        return [file]
    top = [name for name in names if "/" not in name and name.endswith(".safetensors")]
    # Some repositories hold the same weights once more in another layout ("consolidated").
    plain = [name for name in top if name.startswith(("model", "adapter_model"))] or top
    if plain:
        return [name for name in plain if INDEX not in names or re.search(r"-of-\d+\.safetensors$", name)]
    if len(_gguf(names)) == 1:
        return _gguf(names)
    if _gguf(names):
        raise ZooError(f"{repository}: holds several GGUF files; name one with file: ({_few(_gguf(names))})")
    raise ZooError(f"{repository}: no safetensors or GGUF weights in this repository")


def _gguf(names: list[str]) -> list[str]:
    return [name for name in names if name.endswith(".gguf")]


def _literal(name: str) -> str:
    """Return a pattern that matches a name and nothing else."""
    return re.sub(r"([\[*?])", r"[\1]", name)


def _few(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") if names else "none"


def _bar(repository: str, progress: Progress) -> Callable[..., Any]:
    """Return a class that huggingface_hub takes for a progress bar."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            self._bytes = options.get("unit") == "B" and options.get("desc") != "Downloading bytes"
            self._done = 0
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            if self._bytes:
                self._done += int(n or 0)
                total = int(self.total or 0)
                message = f"downloading {repository}: {self._done / 1e9:.2f} of {total / 1e9:.2f} GB"
                progress(Step(stage="inspect", message=message, done=self._done, total=total))
            return None

    return Bar


@contextmanager
def _hub_errors(repository: str, revision: str | None) -> Iterator[None]:
    from huggingface_hub import errors

    name = f"{repository}@{revision}" if revision else repository
    try:
        yield
    except ZooError:
        raise
    except errors.GatedRepoError:
        raise ZooError(
            f"{name}: access to this repository has to be granted on its page; then set HF_TOKEN or run 'hf auth login'"
        ) from None
    except errors.RevisionNotFoundError:
        raise ZooError(f"{name}: the repository has no revision '{revision}'") from None
    except errors.RepositoryNotFoundError:
        raise ZooError(
            f"{name}: there is no such directory here and no such repository on the hub (private ones need HF_TOKEN)"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise ZooError(
            f"{name}: there is no such directory here, the hub cannot be reached, and its cache does not have it; "
            "check the network (and HF_HUB_OFFLINE), or give a local path"
        ) from None
    except errors.HFValidationError as error:
        raise ZooError(f"{name}: not a hub id: {first_line(error)}") from None
    except errors.HfHubHTTPError as error:
        raise ZooError(f"{name}: the hub refused: {first_line(error)}") from error
    except _unreachable():
        raise ZooError(
            f"{name}: there is no such directory here, and the hub cannot be reached; check the network "
            "(and HF_HUB_OFFLINE), or give a local path"
        ) from None
    except OSError as error:
        if is_disk_full(error):
            raise DiskFullError(f"{name}: no space left to download it; free some, then run again") from error
        raise ZooError(f"{name}: cannot be downloaded: {first_line(error)}") from error


def _unreachable() -> tuple[type[BaseException], ...]:
    """Return what huggingface_hub raises when there is no answer.

    Its client is a library of changing name; the base of all errors of that library is among its own errors' bases.
    """
    from huggingface_hub import errors

    client = next(base for base in errors.HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
    return (errors.OfflineModeIsEnabled, client, ConnectionError, TimeoutError)
