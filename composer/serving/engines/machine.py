"""What the machine has that engines care about."""

import shutil
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from composer.serving.engines import EngineSettings


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    index: int
    total: int
    """Bytes of memory."""
    free: int
    """Bytes of it that nobody uses now."""


@lru_cache
def has_gpu() -> bool:
    """Return whether an NVIDIA or AMD GPU that engines can use is here, without starting CUDA."""
    if shutil.which("nvidia-smi") is None and shutil.which("rocm-smi") is None:
        return False
    import torch

    return torch.cuda.is_available()


def gpus() -> list[Gpu]:
    """Return the GPUs and their memory; none where there is no GPU, or no `nvidia-smi` to ask."""
    program = shutil.which("nvidia-smi")
    if not has_gpu() or program is None:
        return []
    query = [program, "--query-gpu=index,memory.total,memory.free", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    found = []
    for line in answer.stdout.splitlines():
        index, total, free = (int(part) for part in line.split(","))
        found.append(Gpu(index, total << 20, free << 20))
    return found


def cores() -> int:
    """Return how many CPU cores this process may use: a container's share, not all that the machine has."""
    import joblib

    return int(joblib.cpu_count())


def visible_gpus(settings: "EngineSettings") -> dict[str, str]:
    """Return the environment that lets an engine see its own GPUs only."""
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, settings.gpus))} if settings.gpus else {}
