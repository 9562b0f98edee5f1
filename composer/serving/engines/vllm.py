"""The vLLM engine, on GPUs and on CPUs."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

from composer.mixture.classes import CLASSES
from composer.serving.engines import EngineSettings
from composer.serving.engines.machine import has_gpu, visible_gpus
from composer.zoo.checkpoint import Checkpoint

CPU_HEAD_SIZES = (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Attention head sizes of vLLM's CPU backend (vllm/v1/attention/backends/cpu_attn.py, and 48, for which it has kernels
too). With another one the engine reports that it is ready and dies on the first request."""

PLAIN_TEMPLATE = Path(__file__).with_name("plain_template.jinja")
"""Joins the messages of a chat, for models that have no chat template of their own."""


class VllmEngine:
    """Starts ``vllm.entrypoints.openai.api_server``.

    The module, not ``vllm serve``: the latter looks up a distribution called "vllm", which CPU builds are not.
    """

    name = "vllm"
    scores_prompts = True
    overhead = 900 << 20

    def missing(self) -> str | None:
        """Return how to install vLLM if it is not there."""
        if find_spec("vllm") is not None:
            return None
        return "vLLM is not installed; run 'make setup', or set serve.engine: transformers"

    def unsupported(self, checkpoint: Checkpoint) -> str | None:
        """Return why vLLM cannot run a checkpoint, or None."""
        if checkpoint.remote_code:
            return "the model brings Python code of its own, which vLLM cannot be relied on to run"
        if checkpoint.architecture in CLASSES:
            return f"vLLM does not know {checkpoint.architecture}, a class of this program's"
        size = _head_size(Path(checkpoint.path))
        plain = checkpoint.hidden_size // checkpoint.heads if checkpoint.hidden_size and checkpoint.heads else size
        if checkpoint.architecture == "Qwen2MoeForCausalLM" and size != plain:
            return f"vLLM gives Qwen2Moe models heads of size {plain} (hidden size over heads), and its are {size}"
        if has_gpu():
            return None
        if size is None or size in CPU_HEAD_SIZES:
            return None
        return f"vLLM's CPU attention has no kernel for head size {size} (it has {', '.join(map(str, CPU_HEAD_SIZES))})"

    def command(self, checkpoint: Checkpoint, settings: EngineSettings) -> list[str]:
        """Return the command line; on a CPU eager mode and a small, fixed key-value cache."""
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server",
            "--model", checkpoint.path,
            "--served-model-name", checkpoint.id,
            "--host", "127.0.0.1",
            "--port", str(settings.port),
            "--max-model-len", str(settings.max_model_len),
            "--dtype", settings.dtype,
        ]  # fmt: skip
        if checkpoint.tokenizer.chat_template is None:
            command += ["--chat-template", str(PLAIN_TEMPLATE)]
        if has_gpu():
            command += ["--gpu-memory-utilization", f"{settings.share:.3f}"]
            if len(settings.gpus) > 1:
                command += ["--tensor-parallel-size", str(len(settings.gpus))]
            if settings.sleeps:
                command += ["--enable-sleep-mode"]
        else:
            command += ["--enforce-eager", "--kv-cache-memory-bytes", str(settings.kv_cache_mb << 20)]
            command += ["--max-num-seqs", "32"]
        return command

    def environment(self, settings: EngineSettings) -> dict[str, str]:
        """Return settings that keep it off the network and, on a CPU, in as few processes as it can do with."""
        environment = {
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(settings.threads),
            **visible_gpus(settings),
        }
        if settings.secret:
            # In the environment, since anybody on this machine can read command lines.
            environment["VLLM_API_KEY"] = settings.secret
        if settings.sleeps:
            environment["VLLM_SERVER_DEV_MODE"] = "1"  # for /sleep and /wake_up
        if not has_gpu():
            environment |= {
                # Several engines with automatic binding may sit on one core.
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                # The worker then lives in the engine's own process: 10 s and 0.6 GB less for each engine.
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "MALLOC_ARENA_MAX": "2",
            }
        return environment


def _head_size(path: Path) -> int | None:
    config = json.loads((path / "config.json").read_text())
    config = config.get("text_config") or config
    if config.get("head_dim"):
        return int(config["head_dim"])
    hidden = config.get("hidden_size") or config.get("n_embd")
    heads = config.get("num_attention_heads") or config.get("n_head")
    return int(hidden) // int(heads) if hidden and heads else None


engine = VllmEngine()
