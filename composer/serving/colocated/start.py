"""How an engine that holds several experts is started and asked."""

import json
from collections.abc import Sequence
from typing import Any

from composer.zoo.checkpoint import Checkpoint

ARCHITECTURE = "ColocatedForCausalLM"
"""What vLLM knows the model of several experts by. Its suffix tells vLLM that it generates text."""


def arguments(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Return what the command line of vLLM's server needs more than that of the first checkpoint alone.

    The longest sequence (`--max-model-len`) must not be more than any of the checkpoints takes.

    Args:
        checkpoints: The experts in the order of their indices; the first is the one given as `--model`.
    """
    overrides = {
        "architectures": [ARCHITECTURE],
        "colocated_architecture": checkpoints[0].architecture,
        "colocated_experts": [checkpoint.path for checkpoint in checkpoints],
    }
    return [
        "--hf-overrides", json.dumps(overrides),
        "--logits-processors", f"composer.serving.colocated.rows:Of{len(checkpoints)}",
        "--enforce-eager",
    ]  # fmt: skip


def environment() -> dict[str, str]:
    """Return environment variables that such an engine needs."""
    # The second model runner tells logits processors nothing of where in the batch a request is.
    return {"VLLM_USE_V2_MODEL_RUNNER": "0"}


def request(index: int) -> dict[str, Any]:
    """Return what the JSON body of a request to an expert has to carry.

    The salt keeps the experts' entries in the prefix cache apart: without it, one expert would carry on from keys and
    values that another one has computed. A salt that a caller brings has to be joined to it, not put in its place.

    Args:
        index: The expert's place among the checkpoints that the engine was started with.
    """
    return {"vllm_xargs": {"expert": index}, "cache_salt": f"expert-{index}"}
