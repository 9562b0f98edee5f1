"""How much each weight of a model matters on the probe texts: what Fisher-weighted averaging and RegMean weigh by.

Both statistics are about as large as the model in float32. They depend on a model and the texts alone, so they are
kept like every artefact, for all merges that the model takes part in.
"""

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from composer.artefacts import Store, digest
from composer.errors import ZooError
from composer.probes.record import load_model
from composer.progress import Progress, Step, silent
from composer.zoo import Checkpoint
from composer.zoo.weights import SafetensorsWeights, TensorHeader

if TYPE_CHECKING:
    import torch

VERSION = 1
"""Changes when a statistic does; part of every key."""
RECENT = 4
"""Inputs of linear layers that are held to see whether the next layer is given one of them."""
Passes: TypeAlias = "Iterator[tuple[str, torch.Tensor]]"
"""Each text and its token ids, `[1, tokens]`: one by one, so that no padding gets into a statistic."""
Headers: TypeAlias = dict[str, TensorHeader]
Found: TypeAlias = "tuple[dict[str, torch.Tensor], dict[str, str] | None]"
"""Tensors by name and, where weights share one, under which name each weight's is."""


def record_fisher(checkpoint: Checkpoint, texts: Sequence[str], store: Store, progress: Progress = silent) -> Path:
    """Return the diagonal of a model's Fisher information on the texts, computed once.

    ``F = mean over texts of (gradient of L)^2``, elementwise, with ``L = -1/T sum over t of log p(y_t | x_1..x_t)``,
    a text's mean loss over its T tokens in nats.

    The labels y are drawn from the model's own next-token distributions, one for each position, not taken from the
    text: the Fisher information is an expectation over them (Matena and Raffel 2021, arXiv 2111.09832, section 3).
    With the text's own tokens it would be the empirical Fisher, which says how badly the model fits the text as much
    as how sharply it reacts to a weight (Kunstner and others 2019, arXiv 1905.12558). And with drawn labels one
    backward pass a text serves all positions: given the text, their scores are independent and zero in the mean, so
    products of two vanish, and ``E[F] = mean over texts of 1/T^2 sum over t of E[(gradient of log p(y_t))^2]``.
    The draw is seeded by the text, so the order of texts does not matter, and models that are alike draw alike.

    Args:
        checkpoint: The model; in float32 on a CPU, in its own type on a GPU. `make_whole` must have been called.
        texts: From `load_texts`.
        store: Keeps the result under the content hash of the model and of the texts.
        progress: Told of each text.

    Returns:
        A directory with `fisher.safetensors`: for every tensor of the checkpoint that is a parameter of the model
        under the same name, a tensor of its shape, float32, at least 0, in nats² per squared unit of the weight. An
        embedding that is the output head too has one, from the gradient of both uses.

    Raises:
        ZooError: if transformers cannot load the model, or what it computes is not finite.
    """
    return _recorded("fisher", _fisher, checkpoint, texts, store, progress)


def record_grams(checkpoint: Checkpoint, texts: Sequence[str], store: Store, progress: Progress = silent) -> Path:
    """Return the inner products of the inputs of a model's linear layers on the texts, computed once.

    ``G = X^T X / n`` with X `[n, in]` the inputs of a layer at the n tokens of all texts: what RegMean weighs its
    weight by (Jin and others 2022, arXiv 2212.09849, section 3; there without 1/n, which cancels between models
    that see the same tokens). The output head is left out.

    Args:
        checkpoint: The model; in float32 on a CPU, in its own type on a GPU. `make_whole` must have been called.
        texts: From `load_texts`.
        store: Keeps the result under the content hash of the model and of the texts.
        progress: Told of each text.

    Returns:
        A directory with `grams.safetensors`: symmetric matrices `[in, in]`, float32, in squared units of the
        activations; and `index.json`, which gives for every tensor of the checkpoint that is the weight of a linear
        layer the name of its matrix. Layers that are given the same tensor (queries, keys, values) have one.

    Raises:
        ZooError: if transformers cannot load the model, or what it computes is not finite.
    """
    return _recorded("grams", _grams, checkpoint, texts, store, progress)


def draw(logits: "torch.Tensor", text: str) -> "torch.Tensor":
    """Return one token a position, `[tokens]`, drawn from the softmax of `logits` `[tokens, vocabulary]`.

    The largest of the logits with Gumbel noise added, which is the same noise for every model.
    """
    import torch

    generator = torch.Generator(logits.device).manual_seed(int(digest(text)[:8], 16))
    noise = torch.empty_like(logits).exponential_(generator=generator)
    return (logits.detach() - noise.log()).argmax(dim=-1)


def _recorded(
    kind: str,
    measure: Callable[[Any, Headers, Passes], Found],
    checkpoint: Checkpoint,
    texts: Sequence[str],
    store: Store,
    progress: Progress,
) -> Path:
    import torch
    from safetensors.torch import save_file

    device = "cuda" if torch.cuda.is_available() else "cpu"
    key = digest([kind, VERSION, checkpoint.content_hash, list(texts), device])
    path = store.path(kind, key)
    if path.is_dir():
        return path

    def passes() -> Passes:
        for done, text in enumerate(texts):
            progress(Step(stage="merge", message=f"{kind} of {checkpoint.id}", done=done, total=len(texts)))
            yield text, torch.tensor([tokenizer(text)["input_ids"][: checkpoint.context_length]], device=device)

    with store.new_directory(kind, key) as directory:
        tokenizer, model = load_model(checkpoint, device)
        tensors, index = measure(model, SafetensorsWeights(Path(checkpoint.path)).headers, passes())
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise ZooError(f"model '{checkpoint.id}': {kind} of {name} is not finite on the probe texts")
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, directory / f"{kind}.safetensors"
        )
        if index is not None:
            (directory / "index.json").write_text(json.dumps(index, indent=1))
    return path


def _fisher(model: Any, headers: Headers, passes: Passes) -> Found:
    import torch

    trained: dict[str, torch.nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = name in headers and headers[name].shape == tuple(parameter.shape)
        if known and not any(parameter is one for one in trained.values()):
            trained[name] = parameter
    sums = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in trained.items()}
    count = 0
    for text, ids in passes:
        with torch.enable_grad():  # lm-eval turns gradients off for the whole process
            logits = model(input_ids=ids, use_cache=False).logits[0].float()
            # Not yet the mean: in half precision the smallest gradients would be lost.
            loss = torch.nn.functional.cross_entropy(logits, draw(logits, text), reduction="sum")
            gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        for total, gradient in zip(sums.values(), gradients, strict=True):
            if gradient is not None:  # an expert that no token was sent to has none
                total.addcmul_(gradient.float(), gradient.float(), value=1 / len(logits) ** 2)
        count += 1
    return {name: total.div_(count) for name, total in sums.items()}, None


def _grams(model: Any, headers: Headers, passes: Passes) -> Found:
    import torch

    grams = _Grams()
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        weight = f"{name}.weight"
        known = weight in headers and isinstance(module, torch.nn.Linear) and module is not head
        if known and headers[weight].shape == tuple(module.weight.shape):
            module.register_forward_pre_hook(lambda _, arguments, weight=weight: grams.look(weight, arguments[0]))
    with torch.no_grad():
        for _, ids in passes:
            model(input_ids=ids, use_cache=False)
    # Matrix products need not be symmetric to the last bit.
    found = {name: (total + total.T) / (2 * grams.rows[name]) for name, total in grams.sums.items()}
    return found, dict(sorted(grams.index.items()))


class _Grams:
    """Sums of inner products, one for all layers that are given the same tensor."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.rows: dict[str, int] = {}
        self.index: dict[str, str] = {}
        self._recent: deque[tuple[str, torch.Tensor, int]] = deque(maxlen=RECENT)

    def look(self, name: str, inputs: "torch.Tensor") -> None:
        """Add the inputs of a layer, `[..., in]`."""
        if name not in self.index:  # at its first call; the version tells a tensor that was changed in place
            same = (one for one, held, version in self._recent if held is inputs and version == inputs._version)
            self.index[name] = next(same, name)
        if self.index[name] != name:
            return
        self._recent.append((name, inputs, inputs._version))
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        if name not in self.sums:
            self.sums[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
        self.sums[name].addmm_(rows.T, rows)
        self.rows[name] = self.rows.get(name, 0) + len(rows)
