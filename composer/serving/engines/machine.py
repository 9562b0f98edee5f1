"""What the machine has that engines care about."""

import shutil
from functools import lru_cache


@lru_cache
def has_gpu() -> bool:
    """Return whether an NVIDIA or AMD GPU that engines can use is here, without starting CUDA."""
    if shutil.which("nvidia-smi") is None and shutil.which("rocm-smi") is None:
        return False
    import torch

    return torch.cuda.is_available()
