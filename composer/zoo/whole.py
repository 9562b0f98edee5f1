"""Writing an adapter's model or a GGUF file out as an ordinary Hugging Face directory, for what needs one."""

from pathlib import Path

from composer.artefacts import Store
from composer.progress import Progress, Step, silent
from composer.zoo.checkpoint import Checkpoint
from composer.zoo.inspection import TOKENIZER_FILES, open_weights
from composer.zoo.weights import TORCH_DTYPES, read_blocks
from composer.zoo.writing import WeightsWriter, copy_files, write_description

BLOCK = 1 << 24
"""Elements read, computed and written at a time."""


def make_whole(checkpoint: Checkpoint, store: Store, progress: Progress = silent) -> None:
    """Make sure that `checkpoint.path` is there: fold in its adapter or dequantise its file, once and for all.

    Raises:
        ZooError: if a tensor cannot be read.
        DiskFullError: if there is no room; nothing is left behind.
    """
    if checkpoint.source.whole or Path(checkpoint.path).is_dir():
        return
    weights = open_weights(checkpoint.source, Path(checkpoint.home))
    done = 0
    with store.new_directory("whole", checkpoint.content_hash) as directory:
        with WeightsWriter(directory, weights.headers) as writer:
            for name, header in weights.headers.items():
                progress(
                    Step(stage="prepare", message=f"{checkpoint.id}: {name}", done=done, total=checkpoint.size_bytes)
                )
                for block in read_blocks(weights, name, BLOCK):
                    writer.write(name, block)
                done += header.nbytes
        # A GGUF file's configuration does not say the type that its weights have once they are dequantised.
        known = checkpoint.dtype in TORCH_DTYPES
        changes = {"dtype": TORCH_DTYPES[checkpoint.dtype]} if known else {}
        write_description(Path(checkpoint.home), directory, changes)
        copy_files((Path(checkpoint.tokenizer_home) / name for name in TOKENIZER_FILES), directory)
