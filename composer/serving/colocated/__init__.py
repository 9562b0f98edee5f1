"""Several experts of one architecture and one tokenizer in one vLLM engine, with one key-value cache.

Doors: `obstacle` says why some checkpoints cannot share an engine; `arguments` and `environment` are what the engine
of the first one is started with to hold them all; `request` is what a request to one of them carries.

Each expert keeps all of its weights and its own settings (RoPE, norms, output head). What is shared is the engine:
one process, one scheduler, one key-value cache. Answers are those that each expert gives alone.
"""

from composer.serving.colocated.fit import obstacle
from composer.serving.colocated.start import arguments, environment, request

__all__ = ["arguments", "environment", "obstacle", "request"]
