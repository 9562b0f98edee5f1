"""What runs the models that a merge search scores: torch in this process, or one vLLM engine."""

from collections.abc import Sequence

from composer.errors import ServeError
from composer.evaluation.settings import EvaluateSection, Scorer
from composer.serving.engines.machine import has_gpu
from composer.serving.engines.vllm import engine
from composer.zoo.checkpoint import Checkpoint

WAY_OUT = "evaluate.scorer=torch does without vLLM"
"""What every error of the engine ends with."""


def check(section: EvaluateSection) -> None:
    """Check that what the recipe asks for is installed; what it says of single models is known later.

    Raises:
        ServeError: if it is not.
    """
    missing = engine.missing() if section.scorer == "vllm" else None
    if missing is not None:
        raise ServeError(f"evaluate.scorer is vllm, but {missing}; {WAY_OUT}")


def choose(section: EvaluateSection, checkpoints: Sequence[Checkpoint]) -> Scorer:
    """Return what models are scored by, the same for all that are compared with one another.

    Args:
        section: The recipe's `evaluate`.
        checkpoints: The models that are merged.

    Raises:
        ServeError: if the recipe asks for vLLM, and it is not installed or cannot run one of them.
    """
    if section.scorer == "torch" or (section.scorer == "auto" and not has_gpu()):
        return "torch"
    problem = engine.missing()
    for one in checkpoints:
        unsupported = engine.unsupported(one)
        problem = problem or (f"'{one.id}': {unsupported}" if unsupported else None)
    if problem is None:
        return "vllm"
    if section.scorer == "auto":
        return "torch"
    raise ServeError(f"evaluate.scorer is vllm, but {problem}; {WAY_OUT}")
