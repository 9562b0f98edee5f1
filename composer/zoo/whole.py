"""Writing an adapter's model or a GGUF file out as an ordinary Hugging Face directory, for what needs one."""

import json
import shutil
from pathlib import Path

from composer.artefacts import Store
from composer.progress import Progress, Step, silent
from composer.zoo.checkpoint import Checkpoint
from composer.zoo.inspection import TOKENIZER_FILES, open_weights
from composer.zoo.weights import INDEX, TensorHeader

SHARD_BYTES = 1 << 30
"""Size of a shard, and the memory that writing takes."""

_CONFIG_DTYPE = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


def make_whole(checkpoint: Checkpoint, store: Store, progress: Progress = silent) -> None:
    """Make sure that `checkpoint.path` is there: fold in its adapter or dequantise its file, once and for all.

    Raises:
        ZooError: if a tensor cannot be read.
        DiskFullError: if there is no room; nothing is left behind.
    """
    if checkpoint.source.whole or Path(checkpoint.path).is_dir():
        return
    from safetensors.torch import save_file

    weights = open_weights(checkpoint.source, Path(checkpoint.home))
    shards = _shards(weights.headers)
    total = checkpoint.size_bytes
    done = 0
    with store.new_directory("whole", checkpoint.content_hash) as directory:
        index = {}
        for number, names in enumerate(shards, start=1):
            single = len(shards) == 1
            file = "model.safetensors" if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
            tensors = {}
            for name in names:
                header = weights.headers[name]
                progress(Step(stage="prepare", message=f"{checkpoint.id}: {name}", done=done, total=total))
                tensors[name] = weights.read(name, 0, header.rows).reshape(header.shape).contiguous()
                index[name] = file
                done += header.nbytes
            save_file(tensors, directory / file, metadata={"format": "pt"})
        if len(shards) > 1:
            content = {"metadata": {"total_size": total}, "weight_map": index}
            (directory / INDEX).write_text(json.dumps(content, indent=2))
        _copy_description(checkpoint, directory)


def _shards(headers: dict[str, TensorHeader]) -> list[list[str]]:
    """Split tensors into runs of at most `SHARD_BYTES`, each of at least one tensor."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, header in headers.items():
        if shards[-1] and size + header.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += header.nbytes
    return shards


def _copy_description(checkpoint: Checkpoint, directory: Path) -> None:
    home, tokenizer_home = Path(checkpoint.home), Path(checkpoint.tokenizer_home)
    config = json.loads((home / "config.json").read_text())
    if checkpoint.dtype in _CONFIG_DTYPE:
        config.pop("torch_dtype", None)
        config["dtype"] = _CONFIG_DTYPE[checkpoint.dtype]
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    for name in TOKENIZER_FILES:
        if (tokenizer_home / name).is_file():
            shutil.copyfile(tokenizer_home / name, directory / name)
    for file in [home / "generation_config.json", *home.glob("LICEN[CS]E*"), *home.glob("*.py")]:
        if file.is_file():
            shutil.copyfile(file, directory / file.name)
