"""The record of a model's behaviour on the probe texts.

Next-token distributions are kept as what the output head turns into them, the last hidden state of each position in
half precision, and its normaliser: with the head, which is on disk anyway, the whole distribution comes back, for
two bytes per hidden unit instead of two per token of the vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer.artefacts import Store, digest
from composer.errors import ZooError, first_line
from composer.probes.attention import AttentionSummary
from composer.progress import Progress, Step, silent
from composer.value import Value
from composer.zoo import Checkpoint, open_weights

if TYPE_CHECKING:
    import torch

VERSION = 1
"""Changes when records do; part of every key."""
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Relative depths at which hidden states are kept; 0 is the embedding, 1 the last layer."""
SPANS = 4
"""Parts a text is cut into, by characters; hidden states are averaged over the tokens that end in each."""
LOGITS_AT_ONCE = 1 << 26
"""Elements of logits held at a time."""
MOST_TEXTS_AT_ONCE = 8


class Head(Value):
    """How a record's hidden states become logits: ``softcap(scale * (hidden @ weight.T + bias))``."""

    weight: str
    """Name of the tensor, `[vocabulary, hidden]`."""
    bias: str | None = None
    scale: float = 1.0
    softcap: float | None = None
    """Logits are squeezed to ``softcap * tanh(logits / softcap)``, as in Gemma 2."""

    def apply(self, products: "torch.Tensor") -> "torch.Tensor":
        """Return logits from products with the weight (and bias)."""
        logits = products * self.scale if self.scale != 1.0 else products
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


class ProbeRecord(Value):
    """What is kept of a model's forward pass; the arrays are in `path`."""

    path: str
    model: str
    """Content hash of the checkpoint."""
    tokens: tuple[tuple[int, ...], ...]
    """Token ids of each text."""
    head: Head | None
    """None where the logits are no plain function of the output head; see `left_out`."""
    left_out: dict[str, str]
    """Features that this model has no record of, with the reason."""
    size_bytes: int

    @property
    def key(self) -> str:
        """Hash of the model and the texts."""
        return Path(self.path).name

    @cached_property
    def arrays(self) -> dict[str, "torch.Tensor"]:
        """The arrays.

        - `hidden` `[positions, hidden]`: what the output head saw, float16; times `scale` `[positions]`.
        - `normaliser` `[positions]`: log of the sum of exp of the logits, nats.
        - `next` `[positions]`: log-probability of the token that follows, nats; nan at the end of a text.
        - `pooled` `[texts, spans, depths, hidden]`: hidden states averaged over spans; nan where a span is empty.
        - `attention` `[texts, depths, queries, bins]`: see `composer.probes.attention`.
        """
        from safetensors.torch import load_file

        return dict(load_file(Path(self.path) / "record.safetensors"))


def record_probes(
    checkpoint: Checkpoint, texts: Sequence[str], store: Store, progress: Progress = silent
) -> ProbeRecord:
    """Run a model on the probe texts once, or return the record of the same run made before.

    Args:
        checkpoint: The model; in float32 on a CPU, in its own type on a GPU. `make_whole` must have been called.
        texts: From `load_texts`.
        store: Keeps the record under the content hash of the model and of the texts.
        progress: Told of each batch of texts.

    Raises:
        ZooError: if transformers cannot load the model.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    key = digest(["probes", VERSION, checkpoint.content_hash, list(texts), device])
    path = store.path("probes", key)
    if not path.is_dir():
        with store.new_directory("probes", key) as directory:
            run = _Run(checkpoint, device)
            for done, batch in run.batches(texts):
                progress(Step(stage="compare", message=f"probing {checkpoint.id}", done=done, total=len(texts)))
                run.forward(batch)
            run.save(directory)
    return ProbeRecord.load(path / "record.json").model_copy(update={"path": str(path)})


def load_model(checkpoint: Checkpoint, device: str) -> tuple[Any, Any]:
    """Return a checkpoint's tokenizer and model, in float32 on a CPU, in its own type on a GPU.

    Raises:
        ZooError: if transformers cannot load them.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"local_files_only": True, "trust_remote_code": checkpoint.remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, **options)
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.path, dtype=torch.float32 if device == "cpu" else "auto", **options
        )
    except Exception as error:  # transformers raises whatever a broken checkpoint makes it stumble over
        reason = first_line(error)
        raise ZooError(f"model '{checkpoint.id}': transformers cannot load it: {reason}") from error
    return tokenizer, model.to(device).eval()


@dataclass
class _Text:
    """A text as one model's tokenizer sees it."""

    place: int
    """Its number among the probe texts."""
    ids: list[int]
    ends: list[int]
    """Character at which each token ends; 0 for one that stands for no text."""
    characters: int


@dataclass
class _Run:
    """One model loaded, and what its forward passes leave."""

    checkpoint: Checkpoint
    device: str
    head: Head | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    rows: dict[int, dict[str, "torch.Tensor"]] = field(default_factory=dict)
    tokens: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tokenizer, self.model = load_model(self.checkpoint, self.device)
        self.attention = AttentionSummary.of(self.model, DEPTHS)
        if self.attention is None:
            self.left_out["attention"] = f"{self.checkpoint.architecture} does not let its attention be watched"

    def batches(self, texts: Sequence[str]) -> Iterator[tuple[int, list[_Text]]]:
        """Yield texts of about the same length together, with the number of those before."""
        tokenized = sorted((self._tokenized(place, text) for place, text in enumerate(texts)), key=lambda t: len(t.ids))
        vocabulary = self.checkpoint.vocabulary_size or 1
        batch: list[_Text] = []
        done = 0
        for text in tokenized:
            size = (len(batch) + 1) * len(text.ids) * vocabulary
            if batch and (len(batch) == MOST_TEXTS_AT_ONCE or size > LOGITS_AT_ONCE):
                yield done, batch
                done += len(batch)
                batch = []
            batch.append(text)
        yield done, batch

    def forward(self, batch: list[_Text]) -> None:
        """Run the model on a batch, padded at the end, where causal attention cannot see it."""
        import torch

        longest = len(batch[-1].ids)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, text in enumerate(batch):
            ids[row, : len(text.ids)] = torch.tensor(text.ids)
            mask[row, : len(text.ids)] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        with torch.inference_mode(), _inputs_of(self.model.get_output_embeddings()) as seen:
            if self.attention is not None:
                self.attention.start(batch, self.device)
            output = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        hidden = seen[0] if seen else None
        with torch.inference_mode():
            if self.head is None and "logits" not in self.left_out:
                self._find_head(hidden, output.logits)
            for row, text in enumerate(batch):
                self.rows[text.place] = self._kept(text, row, hidden, output)
                self.tokens[text.place] = tuple(text.ids)

    def save(self, directory: Path) -> None:
        """Write the record into a directory."""
        import torch
        from safetensors.torch import save_file

        places = sorted(self.rows)
        arrays = {}
        for name in self.rows[places[0]]:
            parts = [self.rows[place][name] for place in places]
            join = torch.stack if name in ("pooled", "attention") else torch.cat
            arrays[name] = join(parts).contiguous()
        save_file(arrays, directory / "record.safetensors")
        ProbeRecord(
            path="",  # wherever the store is when it is loaded
            model=self.checkpoint.content_hash,
            tokens=tuple(self.tokens[place] for place in places),
            head=self.head,
            left_out=self.left_out,
            size_bytes=(directory / "record.safetensors").stat().st_size,
        ).save(directory / "record.json")

    def _tokenized(self, place: int, text: str) -> _Text:
        encoded = self.tokenizer(text, return_offsets_mapping=True)
        most = self.checkpoint.context_length or len(encoded["input_ids"])
        return _Text(
            place=place,
            ids=list(encoded["input_ids"])[:most],
            ends=[end for _, end in encoded["offset_mapping"]][:most],
            characters=len(text),
        )

    def _find_head(self, hidden: "torch.Tensor | None", logits: "torch.Tensor") -> None:
        """Find out how hidden states become logits, and check it against those of the model."""
        import torch

        module = self.model.get_output_embeddings()
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        weight = names.get(id(getattr(module, "weight", None)))
        bias = getattr(module, "bias", None)
        known = open_weights(self.checkpoint.source, Path(self.checkpoint.home)).headers
        if hidden is None or weight not in known:
            self.left_out["logits"] = "its output head is not a tensor of the checkpoint"
            return
        config = self.model.config.get_text_config()
        times, divided = (getattr(config, name, None) or 1.0 for name in ("logit_scale", "logits_scaling"))
        cap = getattr(config, "final_logit_softcapping", None)
        head = Head(
            weight=weight,
            bias=names.get(id(bias)) if bias is not None else None,
            scale=float(times) / float(divided),
            softcap=float(cap) if cap else None,
        )
        rebuilt = head.apply(module(hidden[:1]).float())
        if torch.allclose(rebuilt, logits[:1].float(), rtol=1e-3, atol=1e-2):
            self.head = head
        else:
            self.left_out["logits"] = "its logits are not a plain function of its output head"

    def _kept(self, text: _Text, row: int, hidden: "torch.Tensor | None", output: Any) -> dict[str, "torch.Tensor"]:
        """Return what is kept of one text."""
        import torch

        count = len(text.ids)
        logits = output.logits[row, :count].float()
        normaliser = logits.logsumexp(dim=-1)
        following = torch.full((count,), float("nan"), device=logits.device)
        targets = torch.tensor(text.ids[1:], device=logits.device)
        following[:-1] = logits[:-1].gather(1, targets[:, None]).squeeze(1) - normaliser[:-1]
        kept = {
            "normaliser": normaliser,
            "next": following,
            "pooled": self._pooled(text, row, output.hidden_states).half(),
        }
        if self.head is not None and hidden is not None:
            states = hidden[row, :count].float()
            scale = states.abs().amax(dim=1).clamp_min(1e-20)
            kept |= {"hidden": (states / scale[:, None]).half(), "scale": scale}
        if self.attention is not None:
            kept["attention"] = self.attention.rows(row).half()
        return {name: tensor.cpu() for name, tensor in kept.items()}

    def _pooled(self, text: _Text, row: int, states: Sequence["torch.Tensor"]) -> "torch.Tensor":
        """Return hidden states averaged over the tokens that end in each span, `[spans, depths, hidden]`.

        The first token is left out: many models park their attention there, with norms far above all others.
        """
        import torch

        chosen = torch.stack(
            [states[round(depth * (len(states) - 1))][row, : len(text.ids)].float() for depth in DEPTHS]
        )
        spans = [min(SPANS - 1, (end - 1) * SPANS // text.characters) if end > 0 else -1 for end in text.ends]
        pooled = torch.full((SPANS, len(DEPTHS), chosen.shape[-1]), float("nan"), device=chosen.device)
        for span in range(SPANS):
            places = [place for place, one in enumerate(spans) if one == span and place > 0]
            if places:
                pooled[span] = chosen[:, places].mean(dim=1)
        # Half precision ends at 65504; a state is compared up to its scale only.
        return pooled / pooled.abs().nan_to_num().amax(dim=(0, 2), keepdim=True).clamp_min(1.0)


@contextmanager
def _inputs_of(module: Any) -> Iterator[list["torch.Tensor"]]:
    """Yield a list that holds what a module was last called with."""
    seen: list[torch.Tensor] = []

    def look(_: Any, arguments: tuple[Any, ...]) -> None:
        seen[:] = [arguments[0]]

    handle = module.register_forward_pre_hook(look) if module is not None else None
    try:
        yield seen
    finally:
        if handle is not None:
            handle.remove()
