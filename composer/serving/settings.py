"""The recipe's `serve`."""

from typing import Annotated, Literal

from pydantic import Field

from composer.serving.engines import ENGINES
from composer.settings import PathText, Section, named


class RemoteExpert(Section):
    """A server elsewhere that speaks the OpenAI API and serves an expert already."""

    url: str = Field(pattern=r"^https?://")
    """Base address of its API, with "/v1"."""
    model: str | None = None
    """What it calls the expert; by default the expert's id."""
    key: Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]*$")] | None = None
    """The environment variable that holds its API key."""


class Limits(Section):
    """What one client may ask of the endpoint."""

    body_mb: float = Field(default=8.0, gt=0)
    """Largest body of a request, in MB."""
    requests: int = Field(default=512, ge=1)
    """Requests that are answered at once; more are told to come again later (429)."""
    read_seconds: float = Field(default=20.0, gt=0)
    """How long a client may take to send its request."""
    answer_seconds: float = Field(default=900.0, gt=0)
    """How long an answer may take, the last token included."""
    sequences: int = Field(default=128, ge=16)
    """Answers of one request: prompts times `n`."""


class ServeSection(Section):
    """The endpoint."""

    engine: named(ENGINES, "auto") = "auto"  # type: ignore[valid-type]
    """`auto` takes vLLM where it is installed and supports the expert, else `transformers serve`."""
    host: str = "127.0.0.1"
    """The address to listen on. The default, loopback, keeps the endpoint on this machine; anywhere else it asks for
    API keys, which `model-composer keys` makes."""
    port: int = Field(default=8000, ge=0, le=65535)
    """The port to listen on; 0 takes any free one."""
    require_key: bool = False
    """Whether to ask for an API key on loopback too."""
    keys: PathText | None = None
    """The file of API keys; by default `keys.json` beside the runs."""
    max_model_len: Annotated[int, Field(ge=16)] | None = None
    """The longest sequence an expert takes, in tokens; by default what its config says, at most 4096."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the engines compute in; `auto` is float32 on a CPU, the checkpoint's own dtype on a GPU."""
    kv_cache_mb: int = Field(default=256, ge=16)
    """Memory for each CPU engine's key-value cache, in MB."""
    colocate: Literal["auto", "always", "never"] = "auto"
    """Whether experts share an engine: adapters of one base, and models of one shape and tokenizer. `auto` shares
    among adapters, and among the others where engines of their own would not fit into memory."""
    remote: dict[str, RemoteExpert] = {}
    """Experts that are served elsewhere already, by id."""
    start_timeout: int = Field(default=600, ge=1)
    """How long one engine may take to get ready, in seconds."""
    when_down: Literal["fallback", "unavailable"] = "fallback"
    """While an expert's engine is down: the next best expert answers what was routed to it, or nobody (503)."""
    drain_seconds: float = Field(default=30.0, ge=0)
    """How long answers that have begun may take to end when the endpoint stops."""
    limits: Limits = Limits()
    """What one client may ask."""
