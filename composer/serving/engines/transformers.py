"""The transformers engine: ``transformers serve``, where vLLM is not installed or lacks a kernel."""

import sys
from importlib.util import find_spec

from composer.mixture.classes import CLASSES
from composer.serving.engines import EngineSettings
from composer.serving.engines.machine import visible_gpus
from composer.zoo.checkpoint import Checkpoint


class TransformersEngine:
    """Starts ``transformers serve`` for one checkpoint."""

    name = "transformers"
    scores_prompts = False
    overhead = 600 << 20

    def missing(self) -> str | None:
        """Return what is not installed; transformers itself always is."""
        absent = [module for module in ("fastapi", "uvicorn", "openai") if find_spec(module) is None]
        return f"'transformers serve' needs {', '.join(absent)}; run 'make setup'" if absent else None

    def unsupported(self, checkpoint: Checkpoint) -> str | None:
        """Return None: what inspection lets through, transformers loads."""
        return None

    def command(self, checkpoint: Checkpoint, settings: EngineSettings) -> list[str]:
        """Return the command line."""
        own = checkpoint.architecture in CLASSES
        module = "composer.serving.engines.transformers_main" if own else "transformers.cli.transformers"
        return [
            sys.executable, "-m", module, "serve", checkpoint.path,
            "--host", "127.0.0.1",
            "--port", str(settings.port),
            "--dtype", settings.dtype,
            "--trust-remote-code" if checkpoint.remote_code else "--no-trust-remote-code",
        ]  # fmt: skip

    def environment(self, settings: EngineSettings) -> dict[str, str]:
        """Return settings that keep it off the network and off other engines' cores."""
        environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(settings.threads)}
        return environment | visible_gpus(settings)


engine = TransformersEngine()
