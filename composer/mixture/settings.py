"""The recipe's `mixture`."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from composer.settings import Identifier, PathText, Section, named
from composer.value import Value
from routers import ROUTERS

OUTSIDE = {"preset", "threshold", "abstain_to", "weights", "tie", "scope"}
"""Settings of a router that gates inside a model know nothing of."""
LINEAR = ("prompt", "linear", "prompt_glue")
"""Routers that are one linear layer."""


BALANCED = 4
"""Layers that preset `balanced` reads at most."""


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

    @model_validator(mode="after")
    def _layer_fits_preset(self) -> Self:
        if self.preset == "balanced" and isinstance(self.layer, int) and self.layer > BALANCED:
            raise ValueError(
                f"layer {self.layer}: preset balanced reads at most {BALANCED} layers; leave one of them out"
            )
        return self


def _changed(section: Section) -> set[str]:
    """Return the keys that are not as by default; a resolved recipe has them all."""
    fields = type(section).model_fields
    return {
        key for key, field in fields.items() if getattr(section, key) != field.get_default(call_default_factory=True)
    }


class LayerSettings(Value):
    """How experts are mixed inside one model."""

    dense_layers: int = Field(default=0, ge=0)
    """The first layers, which are the dense model's alone."""
    top_k: int = Field(default=1, ge=1)
    """How many experts work on one token, or one prompt."""
    routing: Literal["token", "sample"] = "token"
    """Whether each token goes its own way, or all of an answer goes the way that its prompt decides."""
    shared_gate: bool = False
    """Whether one gate, before the first layer of experts, decides for all layers."""


class MixtureSection(Section):
    """How experts that cannot be merged are combined."""

    level: Literal["model", "block", "ffn"] = "model"
    """What is chosen between: whole models, of any architectures; whole decoder layers, of models of one shape; or
    their feed-forward parts (MLPs), which makes a standard sparse checkpoint."""
    router: RouterSection = RouterSection()
    top_k: int = Field(default=1, ge=1)
    """How many experts work on one prompt, or on one token. Above 1 at level model, whole models of one tokenizer
    answer together, their distributions averaged token by token."""
    max_parameters: Annotated[int, Field(ge=1)] | None = None
    """Parameters of all experts together, counted as whole models, at most. Where there would be more, those that
    score lowest on the proxy items are left out."""
    dense: Identifier | Literal["average"] = "average"
    """At levels block and ffn: the model that gives embedding, head and first layers (and at level ffn attention), an
    expert or their uniform average."""
    dense_layers: int = Field(default=0, ge=0)
    """At levels block and ffn: so many first layers are the dense model's alone."""
    routing: Literal["auto", "token", "sample"] = "auto"
    """At levels block and ffn: whether each token goes its own way, or all of an answer the way that its prompt
    decides. `auto` is by sample at level block, by token at level ffn, which knows no other."""
    shared_gate: bool = False
    """At level block: whether one gate decides for all layers."""

    @model_validator(mode="after")
    def _belongs_to_its_level(self) -> Self:
        given = _changed(self) & {"dense", "dense_layers", "routing", "shared_gate"}
        if self.level == "model" and given:
            raise ValueError(f"{', '.join(sorted(given))}: only levels block and ffn have it")
        if self.level == "ffn" and (self.routing == "sample" or self.shared_gate):
            raise ValueError("level ffn routes each token by a gate of each layer; level block can do otherwise")
        if not self.inside:
            return self
        if self.router.kind not in LINEAR:
            raise ValueError(
                f"router kind {self.router.kind}: a gate inside a model is one linear layer ({', '.join(LINEAR)})"
            )
        useless = _changed(self.router) & (OUTSIDE if self.level == "model" else OUTSIDE | {"encoder", "layer"})
        if useless:
            raise ValueError(f"router {', '.join(sorted(useless))}: only whole models behind a router have it")
        return self

    @property
    def inside(self) -> bool:
        """Whether experts become one model, rather than models behind a router."""
        return self.level != "model" or self.top_k > 1

    @property
    def layers(self) -> LayerSettings:
        """What a mixture inside one model goes by."""
        routing = self.routing
        if routing == "auto":
            routing = "token" if self.level == "ffn" else "sample"
        return LayerSettings(
            dense_layers=self.dense_layers, top_k=self.top_k, routing=routing, shared_gate=self.shared_gate
        )
