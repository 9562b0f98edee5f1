"""What vLLM loads in each of its processes, by the entry point group ``vllm.general_plugins``."""


def register() -> None:
    """Tell vLLM of the model of several experts; a second call changes nothing."""
    from vllm import ModelRegistry

    from composer.serving.colocated.start import ARCHITECTURE

    # By name: a class would make every engine, of whatever model, import it, and with it start CUDA.
    ModelRegistry.register_model(ARCHITECTURE, f"composer.serving.colocated.model:{ARCHITECTURE}")
