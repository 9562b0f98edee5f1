"""Carrying out one merge with mergekit."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from composer.artefacts import Store, digest
from composer.errors import DiskFullError, MergeError, disk_errors, first_line
from composer.merging.operators import OPERATORS, Operator, Parameter
from composer.merging.plan import MergeStep
from composer.zoo import TOKENIZER_FILES, Checkpoint, Lineage, inspect_checkpoint

_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def make_merge(
    step: MergeStep,
    inputs: list[Checkpoint],
    base: Checkpoint | None,
    store: Store,
    *,
    dtype: str | None = None,
    seed: int = 0,
) -> Checkpoint:
    """Merge `inputs` as `step` says, or return the same merge made before.

    Args:
        step: The operator and its parameters.
        inputs: The checkpoints, in the step's order; all of one shape and tokenizer.
        base: The checkpoint they were fine-tuned from; only needed by operators on task vectors.
        store: Where the merged checkpoint is kept, under the hash of all that determines it.
        dtype: Storage type of the result; by default that of the first input.
        seed: Seed of operators that draw random masks.

    Raises:
        MergeError: if the operator does not fit the inputs, or mergekit fails.
        DiskFullError: if there is no room for the result.
    """
    operator = OPERATORS.get(step.operator)
    parameters = operator.resolve(step.operator, len(inputs), step.parameters)
    if operator.needs_base and base is None:
        raise MergeError(
            f"merge '{step.name}': operator '{step.operator}' works on task vectors; set zoo.base in the recipe"
        )
    out_dtype = dtype or _DTYPES.get(inputs[0].dtype, "float32")
    lineage = Lineage(
        operator=step.operator,
        inputs=step.inputs,
        input_hashes=tuple(checkpoint.content_hash for checkpoint in inputs),
        parameters=parameters,
        base=base.content_hash if base is not None and operator.needs_base else None,
        dequantised={name: kind for one in inputs for name, kind in one.dequantised.items()},
    )
    key = digest([lineage.model_dump(exclude={"inputs", "dequantised"}), out_dtype, seed, _version()])
    path = store.path("merged", key)
    if not path.exists():
        with store.new_directory("merged", key) as directory:
            _run(step.name, operator, parameters, inputs, base, out_dtype, seed, directory)
    return inspect_checkpoint(step.name, path, store, trust_remote_code=_remote_code(inputs)).renamed(
        step.name, lineage
    )


def _run(
    name: str,
    operator: Operator,
    parameters: dict[str, Parameter],
    inputs: list[Checkpoint],
    base: Checkpoint | None,
    out_dtype: str,
    seed: int,
    out: Path,
) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    with _plain_paths([*inputs, *([base] if base is not None else [])]) as paths:
        models = []
        for index, checkpoint in enumerate(inputs):
            own = {key: parameters[key] for key in operator.per_input}
            each = {key: value[index] if isinstance(value, list) else value for key, value in own.items()}
            models.append({"model": paths[checkpoint.content_hash], "parameters": each})
        # The donor of configuration and tokenizer is always said: without it mergekit draws one at random.
        donor = base if operator.needs_base and base is not None else inputs[0]
        settings = {
            "models": models,
            "merge_method": operator.method,
            "base_model": paths[donor.content_hash],
            "parameters": {key: value for key, value in parameters.items() if key in operator.overall},
            "dtype": "float32",
            "out_dtype": out_dtype,
        }
        if _vocabularies_differ([*inputs, donor]):
            # Every token of any input; one that only some have is taken from those.
            settings["tokenizer"] = {"source": "union"}
        options = MergeOptions(
            quiet=True, random_seed=seed, write_model_card=False, trust_remote_code=_remote_code(inputs)
        )
        try:
            with disk_errors(out):
                run_merge(MergeConfiguration.model_validate(settings), str(out), options)
        except DiskFullError:
            raise
        except Exception as error:
            raise MergeError(f"merge '{name}' ({operator.method}): mergekit: {first_line(error)}") from error
    if donor.source.kind == "gguf" and "tokenizer" not in settings:
        _copy_original_tokenizer(inputs, out)
    generation = Path(donor.path) / "generation_config.json"  # mergekit does not copy it
    if generation.is_file():
        shutil.copyfile(generation, out / generation.name)
    (out / "mergekit_config.yml").unlink(missing_ok=True)  # holds paths of this machine; the lineage is ours
    for file in out.iterdir():
        file.chmod(0o644)


def _copy_original_tokenizer(inputs: list[Checkpoint], out: Path) -> None:
    """Prefer the tokenizer of an input that has its own to one rebuilt from a GGUF file."""
    originals = [Path(one.tokenizer_home) for one in inputs if one.source.kind != "gguf"]
    for name in TOKENIZER_FILES if originals else ():
        file = originals[0] / name
        (out / name).unlink(missing_ok=True)
        if file.is_file():
            shutil.copyfile(file, out / name)


@contextlib.contextmanager
def _plain_paths(checkpoints: list[Checkpoint]) -> Iterator[dict[str, str]]:
    """Yield a path for each content hash that mergekit reads rightly.

    mergekit parses "+" and "@" in a path as LoRA and revision, and keeps files open by path for the life of the
    process; links named by content hash avoid both.
    """
    with tempfile.TemporaryDirectory(prefix="model-composer-") as directory:
        links = {}
        for checkpoint in checkpoints:
            link = Path(directory) / checkpoint.content_hash
            if not link.exists():
                link.symlink_to(checkpoint.path)
            links[checkpoint.content_hash] = str(link)
        yield links


def _vocabularies_differ(checkpoints: list[Checkpoint]) -> bool:
    return len({(one.tokenizer.vocabulary, one.tokenizer.added_tokens, one.vocabulary_size) for one in checkpoints}) > 1


def _remote_code(inputs: list[Checkpoint]) -> bool:
    return any(checkpoint.remote_code for checkpoint in inputs)


def _version() -> str:
    from importlib.metadata import version

    return f"mergekit {version('mergekit')}"
