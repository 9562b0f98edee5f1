"""GGUF files, dequantised tensor by tensor.

Names and layouts are translated by transformers' own GGUF tables, so what it can load can be read here. What was
quantised comes out as bfloat16, what was stored in floating point as it was stored.
"""

import json
import threading
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer.artefacts import Store, digest
from composer.errors import ZooError, first_line
from composer.value import Value
from composer.zoo.weights import TensorHeader

if TYPE_CHECKING:
    import torch

_PLAIN = ("F64", "F32", "F16", "BF16")
"""Types that are not quantised, by the names that safetensors gives them too."""
MAGIC = b"GGUF"
HEADERS = "headers.json"


_Opened = tuple[Any, dict[str, str], dict[str, Any]]
"""A processor of layouts, transformers' names by those of the file, and tensors by transformers' names."""


class _Headers(Value):
    headers: dict[str, TensorHeader]


def describe_gguf(file: Path, store: Store) -> Path:
    """Return a directory with the configuration and the tokenizer that a GGUF file holds; made once per file.

    Raises:
        ZooError: if the file is corrupt, or of an architecture that transformers cannot read.
    """
    status = file.stat()
    with file.open("rb") as stream:
        if stream.read(4) != MAGIC:
            raise ZooError(f"{file}: not a GGUF file; download it again")
    directory = store.path("gguf", digest([str(file.resolve()), status.st_size, status.st_mtime_ns]))
    if directory.is_dir():
        return directory
    from transformers import AutoConfig, AutoTokenizer

    reader = _reader(file)
    _check_sizes(file, reader)
    with store.new_directory("gguf", directory.name) as new:
        try:
            config = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name, local_files_only=True)
            config.architectures = [_model_class(config).__name__]
            config.name_or_path = ""
            config.save_pretrained(new)
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, local_files_only=True)
            tokenizer.save_pretrained(new)
            _Headers(headers=_headers(file, config)).save(new / HEADERS)
        except ZooError:
            raise
        except Exception as error:  # transformers raises whatever it stumbles over
            raise ZooError(f"{file}: transformers cannot read this GGUF file: {first_line(error)}") from error
        licence = reader.get_field("general.license")
        if licence is not None:
            (new / "README.md").write_text(f"---\nlicense: {licence.contents()}\n---\n")
        (new / "quantisation.json").write_text(json.dumps(_types(reader)))
    return directory


def quantisation(description: Path) -> str | None:
    """Return the quantised type most weights of a described GGUF file have, e.g. "Q4_K", or None if none has one."""
    types: dict[str, int] = json.loads((description / "quantisation.json").read_text())
    quantised = {name: count for name, count in types.items() if name not in _PLAIN}
    return max(quantised, key=lambda name: quantised[name]) if quantised else None


class GgufWeights:
    """The weights of a GGUF file under transformers' names."""

    def __init__(self, file: Path, description: Path) -> None:
        """Take the headers from a directory that `describe_gguf` made; the file itself is opened when it is read."""
        self._file, self._description = file, description
        self.headers = _Headers.load(description / HEADERS).headers
        self._held = threading.local()
        self._opened: _Opened | None = None
        self._lock = threading.Lock()

    def read(self, name: str, start: int, stop: int) -> "torch.Tensor":
        """Return rows `start` to `stop`; see `Weights.read`. Each thread holds one whole tensor at a time."""
        if getattr(self._held, "name", None) != name:
            self._held.tensor = self._dequantised(name)
            self._held.name = name
        rows: torch.Tensor = self._held.tensor[start:stop]
        return rows

    def _open(self) -> "_Opened":
        """Open the file, once for all threads."""
        from transformers import AutoConfig

        with self._lock:
            if self._opened is None:
                config = AutoConfig.from_pretrained(str(self._description), local_files_only=True)
                processor, names, _ = _translation(self._file, config)
                self._opened = processor, names, _tensors(self._file, names)
            return self._opened

    def _dequantised(self, name: str) -> "torch.Tensor":
        import numpy as np
        import torch
        from gguf import dequantize

        header, (processor, names, tensors) = self.headers[name], self._open()
        tensor = tensors[name]
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
            values = processor.process(
                weights=values, name=tensor.name, tensor_key_mapping=names, parsed_parameters={"tensors": {}}
            ).weights
        except Exception as error:
            raise ZooError(f"{self._file}: tensor {tensor.name} cannot be dequantised: {first_line(error)}") from error
        if tuple(values.shape) != header.shape:
            raise ZooError(
                f"{self._file}: tensor {tensor.name} has shape {list(values.shape)} where {name} has "
                f"{list(header.shape)}; the file is corrupt or of another version"
            )
        return torch.from_numpy(np.array(values)).to(header.torch_dtype)


def _headers(file: Path, config: Any) -> dict[str, TensorHeader]:
    """Return what the tensors will be once they are dequantised.

    Raises:
        ZooError: if a tensor of the model is not in the file.
    """
    _, names, shapes = _translation(file, config)
    tensors = _tensors(file, names)
    missing = sorted(set(shapes) - set(tensors))
    if missing:
        raise ZooError(f"{file}: holds nothing for tensor {missing[0]} of {config.architectures[0]}")
    return {
        name: TensorHeader(
            file=str(file),
            dtype=kind if (kind := tensors[name].tensor_type.name) in _PLAIN else "BF16",
            shape=shapes[name],
            offset=int(tensors[name].data_offset),
        )
        for name in sorted(shapes)
    }


def _tensors(file: Path, names: dict[str, str]) -> dict[str, Any]:
    """Return the file's tensors by transformers' names."""
    return {names[one.name]: one for one in _reader(file).tensors if one.name in names}


@lru_cache(maxsize=8)
def _reader_of(path: str, size: int, modified: int) -> Any:
    from gguf import GGUFReader

    return GGUFReader(path)


def _reader(file: Path) -> Any:
    status = file.stat()
    try:
        return _reader_of(str(file), status.st_size, status.st_mtime_ns)
    except Exception as error:  # a corrupt header can make the reader fail anywhere
        raise ZooError(f"{file}: not a readable GGUF file ({first_line(error)}); download it again") from error


def _check_sizes(file: Path, reader: Any) -> None:
    size = file.stat().st_size
    for tensor in reader.tensors:
        if tensor.data_offset + tensor.n_bytes > size:
            raise ZooError(f"{file}: truncated: tensor {tensor.name} ends beyond the file; download it again")


def _types(reader: Any) -> dict[str, int]:
    """Return the number of elements stored in each type."""
    types: Counter[str] = Counter()
    for tensor in reader.tensors:
        types[tensor.tensor_type.name] += int(tensor.n_elements)
    return dict(types)


def _model_class(config: Any) -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def _translation(file: Path, config: Any) -> tuple[Any, dict[str, str], dict[str, tuple[int, ...]]]:
    """Return the processor of layouts, transformers' names by GGUF names, and the shapes that must be there."""
    import torch
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
        read_field,
    )

    with torch.device("meta"):
        model = _model_class(config)(config)
    architecture = read_field(_reader(file), "general.architecture")[0]
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    names = get_gguf_hf_weights_map(model, processor)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ()) if config.tie_word_embeddings else set()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    return processor, names, shapes
