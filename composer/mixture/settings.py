"""The recipe's `mixture`."""

from typing import Annotated, Literal

from pydantic import Field

from composer.settings import Identifier, PathText, Section, named
from routers import ROUTERS


class RouterSection(Section):
    """How a prompt finds its expert."""

    kind: named(ROUTERS) = "prompt"  # type: ignore[valid-type]
    """`prompt` is initialised from example requests, without training; `linear` and `mlp` learn from them and from
    what `learn_from` and `labelled` give; `prompt_glue` is the published recipe, `fixed`, `random` and `oracle` are to
    compare with."""
    preset: Literal["accurate", "balanced", "fast"] = "accurate"
    """What may read the prompt: `accurate` takes any number of an expert's layers, `balanced` at most four, `fast` a
    table of token vectors, which is a lookup."""
    encoder: str = "auto"
    """The expert whose first layers read the prompt, or the directory or hub id of a sentence encoder; `auto` takes the
    expert that separates the examples best."""
    layer: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """How many of its layers; `auto` chooses by leave-one-out on the examples."""
    learn_from: Literal["examples", "proxy", "language"] = "examples"
    """What routers that learn are shown beside the examples: the proxy items, each with the experts that answer it
    best, or the probe texts, each with the experts that predict it best (no labels needed)."""
    labelled: PathText | None = None
    """A file of JSON lines, {"text": …, "expert": …}, that routers learn from too."""
    threshold: float = Field(default=0.0, ge=0, lt=1)
    """Below this probability of the likeliest expert, `abstain_to` answers; see 'model-composer router tune'."""
    temperature: float = Field(default=1.0, gt=0)
    """Scores are divided by it before they become probabilities."""
    abstain_to: Identifier | Literal["auto"] = "auto"
    """The expert that answers unclear prompts; `auto` takes the best on the proxy split."""
    weights: dict[Identifier, Annotated[float, Field(gt=0)]] = {}
    """Factors on experts' probabilities, to send more or fewer prompts their way."""
    tie: float = Field(default=0.0, ge=0, lt=1)
    """Experts whose probability is less than this behind the likeliest one's are as good: the smallest answers."""
    scope: Literal["last", "first", "conversation"] = "last"
    """What of a chat is read: the last user message, the first one, so that a conversation stays with one expert, or
    all user messages together."""


class MixtureSection(Section):
    """How experts that cannot be merged are combined."""

    level: Literal["model"] = "model"
    """Whole models, one chosen per prompt."""
    router: RouterSection = RouterSection()
    top_k: Literal[1] = 1
    """How many experts answer one prompt."""
