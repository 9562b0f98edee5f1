"""Encoders: what a text looks like to a router.

A feature is the mean over a text's own tokens: no BOS, no chat template, no padding, one text at a time, so it depends
on nothing but the text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from composer.errors import RouterError, first_line
from routers import Candidate, EncoderManifest

MAX_TOKENS = 256
"""Longer texts are read up to here; what a request is about shows early."""
TABLE = "table.safetensors"
TABLE_WIDTH = 256
"""Most dimensions of a table's vectors."""
RARE = 1e-4
"""Tokens more frequent than this weigh less in a table (smooth inverse frequency; Arora and others 2017)."""
BATCH = 512
"""Tokens that are read at once when a table is made."""

_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")

Pool = Literal["mean", "last"]


class Encoder(Protocol):
    """Reads a text."""

    def __call__(self, text: str) -> Tensor:
        """Return the feature of a text, `[width]`."""
        ...


class LayersEncoder:
    """The hidden states after the first layers of a causal model."""

    def __init__(
        self, path: str, layers: int, *, remote_code: bool = False, pool: Pool = "mean", bos: bool = False
    ) -> None:
        """Load some layers of a checkpoint, in float32 on the CPU.

        Args:
            path: Its directory.
            layers: How many; 0 is the embedding alone.
            remote_code: Whether its own Python code may run.
            pool: Over which of a text's tokens.
            bos: Whether the token that begins a text is put before it.

        Raises:
            RouterError: if transformers cannot load it.
        """
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        options = {"local_files_only": True, "trust_remote_code": remote_code}
        self.layers, self.pool, self.bos = layers, pool, bos
        try:
            config = AutoConfig.from_pretrained(path, **options)
            config.get_text_config().num_hidden_layers = max(1, layers)
            self.tokenizer = AutoTokenizer.from_pretrained(path, **options)
            self.model: Any = AutoModel.from_pretrained(path, config=config, dtype=torch.float32, **options).eval()
        except Exception as error:  # transformers raises whatever a broken checkpoint makes it stumble over
            raise RouterError(f"{path} cannot read prompts: {first_line(error)}") from error
        for name in _FINAL_NORMS:
            if hasattr(self.model, name):
                # The gates live in the raw residual stream, which the final norm would rescale.
                setattr(self.model, name, nn.Identity())

    @torch.inference_mode()
    def __call__(self, text: str) -> Tensor:
        """Return the feature of a text, `[hidden]`."""
        ids = token_ids(self.tokenizer, text, bos=self.bos)
        if self.layers == 0:
            states: Tensor = self.model.get_input_embeddings()(ids)
        else:
            states = self.model(input_ids=ids, use_cache=False).last_hidden_state
        return _pooled(states[0], self.pool)


class SentenceEncoder:
    """A bidirectional encoder from a directory or the hub: the mean of its last states."""

    def __init__(self, source: str) -> None:
        """Load it, in float32 on the CPU.

        Raises:
            RouterError: if transformers cannot.
        """
        from transformers import AutoModel, AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(source)
            self.model: Any = AutoModel.from_pretrained(source, dtype=torch.float32, use_safetensors=True).eval()
        except Exception as error:  # transformers raises whatever a broken checkpoint makes it stumble over
            raise RouterError(
                f"mixture.router.encoder: '{source}' is no expert, and cannot be loaded as a sentence encoder: "
                f"{first_line(error)}"
            ) from error

    @torch.inference_mode()
    def __call__(self, text: str) -> Tensor:
        """Return the feature of a text, `[hidden]`."""
        # Such encoders were trained with their special tokens around the text.
        given = self.tokenizer(text, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        states: Tensor = self.model(**given).last_hidden_state[0]
        return states.mean(dim=0)


class TableEncoder:
    """The mean of token vectors: a lookup, no forward pass."""

    def __init__(self, tokenizer: Any, vectors: Tensor, weights: Tensor) -> None:
        """Keep a table.

        Args:
            tokenizer: What the table's rows are tokens of.
            vectors: `[tokens, width]`.
            weights: `[tokens]`.
        """
        self.tokenizer, self.vectors, self.weights = tokenizer, vectors, weights

    @torch.inference_mode()
    def __call__(self, text: str) -> Tensor:
        """Return the feature of a text, `[width]`."""
        ids = token_ids(self.tokenizer, text)[0].clamp_max(len(self.vectors) - 1)
        weights = self.weights[ids].float()
        return weights @ self.vectors[ids].float() / weights.sum()


@dataclass(frozen=True)
class Loaded:
    """An encoder that was chosen, and what was read with it."""

    manifest: EncoderManifest
    encoder: Encoder


def load_encoder(
    manifest: EncoderManifest,
    directory: Path,
    candidates: Sequence[Candidate],
    *,
    pool: Pool = "mean",
    bos: bool = False,
) -> Encoder:
    """Load what a manifest names.

    Args:
        manifest: Which encoder.
        directory: Where the router's files are.
        candidates: The experts.
        pool: As of `LayersEncoder`.
        bos: As of `LayersEncoder`.

    Raises:
        RouterError: if it cannot be loaded.
    """
    own = next((one for one in candidates if one.id == manifest.source), None)
    if manifest.kind == "table":
        table = load_file(directory / TABLE)
        return TableEncoder(_tokenizer(manifest.source, own), table["vectors"], table["weights"])
    if own is None:
        return SentenceEncoder(manifest.source)
    return LayersEncoder(own.path, manifest.layers or 0, remote_code=own.remote_code, pool=pool, bos=bos)


@torch.inference_mode()
def features_by_layer(
    candidate: Candidate, texts: Sequence[str], most: int | None = None, *, pool: Pool = "mean", bos: bool = False
) -> Tensor:
    """Return the features of texts after 0, 1, … layers of an expert, `[layers, texts, hidden]`.

    Args:
        candidate: The expert.
        texts: What to read.
        most: Layers, at most.
        pool: As of `LayersEncoder`.
        bos: As of `LayersEncoder`.

    Raises:
        RouterError: if transformers cannot load it.
    """
    from transformers import AutoConfig

    options = {"local_files_only": True, "trust_remote_code": candidate.remote_code}
    try:
        depth = int(AutoConfig.from_pretrained(candidate.path, **options).get_text_config().num_hidden_layers)
    except Exception as error:  # as above
        raise RouterError(f"{candidate.path} cannot read prompts: {first_line(error)}") from error
    # The last of the states has the final norm on it: it is passed through with the identity instead.
    layers = depth if most is None else min(depth, most)
    encoder = LayersEncoder(candidate.path, layers, remote_code=candidate.remote_code)
    rows = []
    for text in texts:
        ids = token_ids(encoder.tokenizer, text, bos=bos)
        states = encoder.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        rows.append(torch.stack([_pooled(layer[0], pool) for layer in states[: layers + 1]]))
    return torch.stack(rows, dim=1)


@torch.inference_mode()
def make_table(source: str, layers: int | None, candidates: Sequence[Candidate], directory: Path) -> EncoderManifest:
    """Write a table of token vectors: what an encoder makes of every token alone.

    Vectors are reduced to their principal directions, and frequent tokens weigh less. Frequencies are not counted but
    taken from the order in which tokenizers learn their tokens (Zipf's law: 1 / rank).

    Args:
        source: An expert's id, or a sentence encoder.
        layers: Of an expert.
        candidates: The experts.
        directory: Where it is written.

    Returns:
        The manifest of an encoder that reads it.
    """
    own = next((one for one in candidates if one.id == source), None)
    tokenizer = _tokenizer(source, own)
    if own is None:
        model = SentenceEncoder(source).model

        def run(ids: Tensor) -> Tensor:
            return model(input_ids=ids).last_hidden_state[:, 0]  # type: ignore[no-any-return]
    else:
        encoder = LayersEncoder(own.path, layers or 0, remote_code=own.remote_code)
        model = encoder.model
        embed = model.get_input_embeddings()

        def run(ids: Tensor) -> Tensor:
            if not layers:
                return embed(ids)[:, 0]  # type: ignore[no-any-return]
            return model(input_ids=ids, use_cache=False).last_hidden_state[:, 0]  # type: ignore[no-any-return]

    # Ids may have gaps, and embeddings more rows than there are tokens, or fewer.
    count = min(max(tokenizer.get_vocab().values()) + 1, int(model.get_input_embeddings().num_embeddings))
    starts = range(0, count, BATCH)
    rows = torch.cat([run(torch.arange(start, min(start + BATCH, count))[:, None]) for start in starts])
    weights = RARE / (RARE + zipf(count))
    mean = rows.mean(dim=0)
    deviation = rows.std(dim=0).clamp_min(1e-6)
    standard = (rows - mean) / deviation
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, _, directions = torch.pca_lowrank(standard, q=min(TABLE_WIDTH, *standard.shape), center=False)
    vectors = (standard @ directions).half()
    save_file({"vectors": vectors.contiguous(), "weights": weights.half()}, directory / TABLE)
    return EncoderManifest(kind="table", source=source, layers=layers)


def zipf(count: int) -> Tensor:
    """Return the share of each of so many tokens in running text if it falls with their number, `[count]`."""
    shares = 1.0 / torch.arange(1, count + 1, dtype=torch.float32)
    return shares / shares.sum()


def token_ids(tokenizer: Any, text: str, *, bos: bool = False) -> Tensor:
    """Return the tokens of a text without special tokens, `[1, tokens]`; an empty text is one space."""
    ids = tokenizer(text, add_special_tokens=False, truncation=True, max_length=MAX_TOKENS).input_ids
    if not ids:
        ids = tokenizer(" ", add_special_tokens=False).input_ids or [tokenizer.eos_token_id or 0]
    if bos and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    return torch.tensor([ids])


def _pooled(states: Tensor, pool: Pool) -> Tensor:
    return states.mean(dim=0) if pool == "mean" else states[-1]


def _tokenizer(source: str, own: Candidate | None) -> Any:
    from transformers import AutoTokenizer

    if own is None:
        return AutoTokenizer.from_pretrained(source)
    return AutoTokenizer.from_pretrained(own.path, local_files_only=True, trust_remote_code=own.remote_code)
