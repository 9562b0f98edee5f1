"""The recipe's `serve`."""

from typing import Annotated, Literal

from pydantic import Field

from composer.serving.engines import ENGINES
from composer.settings import Section, named


class ServeSection(Section):
    """The endpoint."""

    engine: named(ENGINES, "auto") = "auto"  # type: ignore[valid-type]
    """`auto` takes vLLM where it is installed and supports the expert, else `transformers serve`."""
    host: str = "127.0.0.1"
    """The address to listen on. The default, loopback, keeps the endpoint on this machine."""
    port: int = Field(default=8000, ge=0, le=65535)
    """The port to listen on; 0 takes any free one."""
    max_model_len: Annotated[int, Field(ge=16)] | None = None
    """The longest sequence an expert takes, in tokens; by default what its config says, at most 4096."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the engines compute in; `auto` is float32 on a CPU, the checkpoint's own dtype on a GPU."""
    kv_cache_mb: int = Field(default=256, ge=16)
    """Memory for each CPU engine's key-value cache, in MB."""
    start_timeout: int = Field(default=600, ge=1)
    """How long one engine may take to get ready, in seconds."""
