"""Taking a composite elsewhere: a directory that needs nothing else, or a proxy's list of models."""

import shutil
import uuid
from io import StringIO
from pathlib import Path

from ruamel.yaml import YAML

from composer.artefacts import Store
from composer.errors import ServeError, disk_errors
from composer.mixture.card import model_card
from composer.mixture.composite import MANIFEST, Composite
from composer.progress import Progress, Step, silent
from composer.zoo import TOKENIZER_FILES, Checkpoint, inspect_checkpoint
from composer.zoo.writing import copy_files
from routers import RouterManifest

EXPERTS, ENCODER = "experts", "encoder"
KEY = "os.environ/MODEL_COMPOSER_API_KEY"
"""Where LiteLLM finds the key; it is never written down."""


def export_directory(source: Path, out: Path, store: Store, progress: Progress = silent) -> Path:
    """Write a composite as one directory: model card, manifest, router, and every expert as a checkpoint in `experts/`.

    It can be moved, uploaded as a repository, and served by path. Of a model's directory only what makes a checkpoint
    goes along: whatever else lies there stays.

    Args:
        source: The composite's directory.
        out: Must not exist, or be empty.
        store: Remembers hashes.
        progress: Told of each expert.

    Raises:
        ServeError: if `out` holds something.
        DiskFullError: if there is no room.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ServeError(f"{out} is not empty; name a new directory")
    composite = Composite.open(source)
    composite.verify(store)
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with disk_errors(out):
            partial.mkdir(parents=True)
            for file in source.iterdir():
                if file.name not in (MANIFEST, EXPERTS):
                    shutil.copy2(file, partial / file.name)
            experts = []
            for done, expert in enumerate(composite.experts, start=1):
                progress(Step(stage="export", message=expert.id, done=done, total=len(composite.experts)))
                place = Path(EXPERTS) / expert.id
                (partial / place).mkdir(parents=True)
                copy_files(_files(expert.checkpoint), partial / place)
                # What was folded or dequantised is known by what it was made from; here it is what it is.
                remote = expert.checkpoint.remote_code
                own = inspect_checkpoint(expert.id, partial / place, store, trust_remote_code=remote)
                here = {name: str(place) for name in ("path", "home", "tokenizer_home")}
                origin = own.source.model_copy(update={"path": str(place)})
                names = ("lineage", "licence", "dequantised_from", "base_hint")
                kept = {name: getattr(expert.checkpoint, name) for name in names}
                moved = own.model_copy(update={**here, **kept, "source": origin})
                experts.append(expert.model_copy(update={"checkpoint": moved}))
            router = _with_encoder(composite, partial)
            written = composite.model_copy(update={"experts": tuple(experts), "router": router})
            written.save(partial / MANIFEST)
            (partial / "README.md").write_text(model_card(written))
            if out.exists():
                out.rmdir()
            partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def litellm_models(composite: Composite, url: str) -> str:
    """Return a LiteLLM configuration (YAML) with the composite and each expert, as they are served at `url`."""
    names = [composite.name, *(expert.id for expert in composite.experts if len(composite.experts) > 1)]
    models = [
        {"model_name": name, "litellm_params": {"model": f"openai/{name}", "api_base": f"{url}/v1", "api_key": KEY}}
        for name in names
    ]
    out = StringIO()
    YAML().dump({"model_list": models}, out)
    return out.getvalue()


def _files(checkpoint: Checkpoint) -> list[Path]:
    """Return the files that make a checkpoint."""
    home = Path(checkpoint.path)
    patterns = ["*.safetensors", "*.safetensors.index.json", "LICEN[CS]E*"]
    patterns += ["*.py"] if checkpoint.remote_code else []
    names = ["config.json", "generation_config.json", "README.md", *TOKENIZER_FILES]
    return [*(home / name for name in names), *(file for pattern in patterns for file in sorted(home.glob(pattern)))]


def _with_encoder(composite: Composite, directory: Path) -> RouterManifest | None:
    """Return the router with a sentence encoder of its own beside it, where it reads with one."""
    router = composite.router
    if router is None or router.encoder is None or router.encoder.source in [one.id for one in composite.experts]:
        return router
    home = Path(router.encoder.source)
    if not home.is_dir():
        from huggingface_hub import snapshot_download

        home = Path(snapshot_download(router.encoder.source, allow_patterns=["*.json", "*.safetensors", "*.txt"]))
    names = ["config.json", "vocab.txt", *TOKENIZER_FILES]
    (directory / ENCODER).mkdir()
    copy_files([*(home / name for name in names), *sorted(home.glob("*.safetensors"))], directory / ENCODER)
    return router.model_copy(update={"encoder": router.encoder.model_copy(update={"source": ENCODER})})
