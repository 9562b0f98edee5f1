"""Where a model looks: attention patterns in a form that models of any shape share."""

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

QUERIES = (0.25, 0.5, 0.75, 1.0)
"""Places in a text, as a part of its tokens, whose attention is kept."""
BINS = 16
"""Parts of the text before a query that its attention is added up in."""
NAME = "composer_probe"


class ProbedText(Protocol):
    """A text as a model's tokenizer sees it."""

    ids: list[int]
    ends: list[int]
    """Character at which each token ends."""


class AttentionSummary:
    """Attention at a few layers and queries, averaged over heads and added up over parts of the text.

    It rides along with the forward pass: sdpa computes the result as ever, and for a few queries of a few layers the
    probabilities are computed once more.
    """

    def __init__(self, layers: dict[int, list[int]], depths: int) -> None:
        self._layers, self._depths = layers, depths
        self._found: list[torch.Tensor] = []
        self._queries: torch.Tensor
        self._bins: torch.Tensor

    @classmethod
    def of(cls, model: Any, depths: tuple[float, ...]) -> "AttentionSummary | None":
        """Watch a model's attention at some relative depths; None if its class does not allow it."""
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

        if not getattr(model, "_supports_attention_backend", False):
            return None
        last = model.config.get_text_config().num_hidden_layers - 1
        layers: dict[int, list[int]] = {}
        for place, depth in enumerate(depths):
            layers.setdefault(round(depth * last), []).append(place)
        summary = cls(layers, len(depths))
        AttentionInterface.register(NAME, summary.attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)
        return summary

    def start(self, batch: "list[Any]", device: str) -> None:
        """Get ready for a batch of texts."""
        import torch

        longest = max(len(text.ids) for text in batch)
        self._queries = torch.tensor(
            [[max(0, round(part * len(text.ids)) - 1) for part in QUERIES] for text in batch], device=device
        )
        bins = torch.zeros(len(batch), len(QUERIES), longest, dtype=torch.long)
        for row, text in enumerate(batch):
            for column, query in enumerate(self._queries[row].tolist()):
                end = max(1, text.ends[query])
                bins[row, column, : query + 1] = torch.tensor(
                    [min(BINS - 1, max(0, one - 1) * BINS // end) for one in text.ends[: query + 1]]
                )
        self._bins = bins.to(device)
        self._found = [torch.zeros(len(batch), len(QUERIES), BINS, device=device) for _ in range(self._depths)]

    def rows(self, row: int) -> "torch.Tensor":
        """Return what was seen of one text of the batch, `[depths, queries, bins]`; each query sums to 1."""
        import torch

        return torch.stack([found[row] for found in self._found])

    def attend(
        self,
        module: Any,
        query: "torch.Tensor",
        key: "torch.Tensor",
        value: "torch.Tensor",
        attention_mask: "torch.Tensor | None",
        scaling: float | None = None,
        **options: Any,
    ) -> Any:
        """Attend as sdpa does; shapes are `[batch, heads, tokens, size]`."""
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        for place in self._layers.get(getattr(module, "layer_idx", -1), []):
            self._found[place] = self._summary(query, key, attention_mask, scaling)
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)

    def _summary(
        self, query: "torch.Tensor", key: "torch.Tensor", mask: "torch.Tensor | None", scaling: float | None
    ) -> "torch.Tensor":
        import torch

        batch, heads, tokens, size = query.shape
        rows = self._queries[:, None, :, None].expand(batch, heads, -1, size)
        asked = query.gather(2, rows).float()
        keys = key.repeat_interleave(heads // key.shape[1], dim=1).float()
        scores = asked @ keys.transpose(2, 3) * (size**-0.5 if scaling is None else scaling)
        visible = torch.arange(tokens, device=query.device) <= self._queries[..., None]
        if mask is not None:
            own = mask.expand(batch, -1, -1, -1).gather(
                2, self._queries[:, None, :, None].expand(batch, mask.shape[1], -1, mask.shape[-1])
            )[:, 0, :, :tokens]
            visible = visible & (own if own.dtype == torch.bool else own > -1)
        weights = scores.masked_fill(~visible[:, None], float("-inf")).softmax(dim=-1).mean(dim=1)
        return torch.zeros(batch, len(QUERIES), BINS, device=query.device).scatter_add_(2, self._bins, weights)
