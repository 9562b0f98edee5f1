"""What is known of a checkpoint without loading its weights."""

from composer.value import Value
from composer.zoo.references import Source


class TokenizerFingerprint(Value):
    """Hashes of the parts of a tokenizer, each apart, so that a difference can be named."""

    vocabulary: str
    """Of the tokenizer's own tokens with their ids."""
    merges: str
    added_tokens: str
    """Of the tokens added to the vocabulary afterwards."""
    special_tokens: str
    chat_template: str | None
    size: int
    """Entries in the vocabulary, added tokens included."""


class Lineage(Value):
    """How a merged checkpoint came about."""

    operator: str
    inputs: tuple[str, ...]
    """Ids of the inputs, in order."""
    input_hashes: tuple[str, ...]
    """Content hashes of the inputs, in the same order."""
    parameters: dict[str, float | bool | list[float | list[float]]]
    """A list has one value per input; a list in it, or for the whole merge, one per group of layers."""
    base: str | None = None
    """Content hash of the base that task vectors start from."""
    seed: int | None = None
    """Seed of random masks, where there are any."""
    texts: str | None = None
    """Hash of the probe texts, where the operator goes by statistics of them."""
    licences: dict[str, str | None] = {}
    """Licences of inputs and base, by id."""
    dequantised: dict[str, str] = {}
    """Models in it that had been quantised, with the type they had, e.g. "Q4_K"."""
    rounding: float | None = None
    """What rounding to the storage type changed, over what the merge changed from its base or first input (norms);
    known once it has been written."""


class Description(Value):
    """A checkpoint as its headers and configuration describe it."""

    id: str
    source: Source
    home: str
    """The directory of its configuration."""
    tokenizer_home: str
    """The directory of its tokenizer."""
    architecture: str
    """The transformers class, e.g. "LlamaForCausalLM"."""
    parameters: int
    """Number of parameters stored (tied ones once)."""
    dtype: str
    """The storage type most of the parameters have, as safetensors names it, e.g. "BF16"."""
    size_bytes: int
    """Size of the weights in their storage types."""
    files: int
    """Number of weight files."""
    context_length: int | None
    hidden_size: int | None
    intermediate_size: int | None
    layers: int | None
    heads: int | None
    kv_heads: int | None
    vocabulary_size: int | None
    tied_head: bool
    """Whether the output head is the embedding."""
    tokenizer: TokenizerFingerprint
    licence: str | None
    shapes_hash: str
    """Hash of all tensor names and shapes, without the number of rows of embedding and output head."""
    settings: dict[str, str]
    """Configuration that must agree between models that are merged (RoPE, norms, activation), as text."""
    base_hint: str | None = None
    """What its adapter or model card says it was made from, as it says it."""
    quantisation: str | None = None
    """How its weights are quantised, if they are: such weights are served, never compared or merged."""
    dequantised_from: str | None = None
    """The quantised type it had before it was dequantised, e.g. "Q4_K"."""
    remote_code: bool = False
    """Whether it brings Python code of its own that the recipe allows to run."""


class Checkpoint(Description):
    """A checkpoint of the zoo."""

    path: str
    """The Hugging Face directory; for an adapter or a GGUF file, where `make_whole` writes it."""
    content_hash: str
    """sha256 over configuration, tokenizer and weight files; names the checkpoint in every cache."""
    lineage: Lineage | None = None

    @property
    def dequantised(self) -> dict[str, str]:
        """The models in it that had been quantised, itself or inputs of merges, with the type each had."""
        own = {self.id: self.dequantised_from} if self.dequantised_from else {}
        return {**own, **(self.lineage.dequantised if self.lineage else {})}

    def renamed(self, name: str, lineage: Lineage | None = None) -> "Checkpoint":
        """Return the same checkpoint under another id, with its lineage if it has one."""
        return self.model_copy(update={"id": name, "lineage": lineage or self.lineage})


class Zoo(Value):
    """All checkpoints of a recipe."""

    members: tuple[Checkpoint, ...]
    base: Checkpoint | None = None
    base_reason: str | None = None
    """How the base is known, where the recipe does not give it."""
    examples: dict[str, tuple[str, ...]] = {}
    """Example requests by member id."""
    skipped: dict[str, str] = {}
    """Models of the recipe that cannot be used, with the reason; only where the recipe says `on_error: skip`."""

    def __getitem__(self, name: str) -> Checkpoint:
        return next(member for member in self.members if member.id == name)

    @property
    def ids(self) -> tuple[str, ...]:
        """The members' ids, in the recipe's order."""
        return tuple(member.id for member in self.members)

    def without(self, broken: dict[str, str]) -> "Zoo":
        """Return the zoo without some members, which are listed as skipped for the reasons given."""
        return self.model_copy(
            update={
                "members": tuple(member for member in self.members if member.id not in broken),
                "base": None if self.base is not None and self.base.id in broken else self.base,
                "skipped": {**self.skipped, **broken},
            }
        )
