"""What is known of a checkpoint without loading its weights."""

from composer.value import Value


class TokenizerFingerprint(Value):
    """Hashes of the parts of a tokenizer, each apart, so that a difference can be named."""

    vocabulary: str
    merges: str
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
    parameters: dict[str, float | bool | list[float]]
    base: str | None = None


class Checkpoint(Value):
    """A model on disk, described from its headers and configuration."""

    id: str
    path: str
    architecture: str
    """The transformers class, e.g. "LlamaForCausalLM"."""
    parameters: int
    """Number of parameters stored (tied ones once)."""
    dtype: str
    """The storage type most of the parameters have, as safetensors names it, e.g. "BF16"."""
    size_bytes: int
    """Size of the weight files."""
    context_length: int | None
    hidden_size: int | None
    layers: int | None
    vocabulary_size: int | None
    tokenizer: TokenizerFingerprint
    licence: str | None
    content_hash: str
    """sha256 over configuration, tokenizer and weight files; names the checkpoint in every cache."""
    shapes_hash: str
    """Hash of all tensor names and shapes."""
    settings: dict[str, str]
    """Configuration that must agree between models that are merged (RoPE, norms, activation), as text."""
    remote_code: bool = False
    """Whether it brings Python code of its own that the recipe allows to run."""
    lineage: Lineage | None = None

    def renamed(self, name: str, lineage: Lineage | None = None) -> "Checkpoint":
        """Return the same checkpoint under another id, with its lineage if it has one."""
        return self.model_copy(update={"id": name, "lineage": lineage or self.lineage})


class Zoo(Value):
    """All checkpoints of a recipe."""

    members: tuple[Checkpoint, ...]
    base: Checkpoint | None = None
    examples: dict[str, tuple[str, ...]] = {}
    """Example requests by member id."""

    def __getitem__(self, name: str) -> Checkpoint:
        return next(member for member in self.members if member.id == name)

    @property
    def ids(self) -> tuple[str, ...]:
        """The members' ids, in the recipe's order."""
        return tuple(member.id for member in self.members)
