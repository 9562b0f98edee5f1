"""Scoring one model in memory again and again, while its weights change: a search over merges.

The scores are those of lm-eval's transformers model. Time is saved where they cannot tell: requests are built and
tokenised once, a context is read once for all its choices, logits are computed only where a choice stands.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from inspect import signature
from io import StringIO
from math import isfinite
from typing import Any

import torch
from lm_eval.models.utils import normalize_gen_kwargs
from transformers.cache_utils import DynamicCache, DynamicLayer

from composer.errors import EvaluationError
from composer.evaluation.answers import Answers, task_answers
from composer.evaluation.engine_model import Engine, EngineModel
from composer.evaluation.lm import Answer, LanguageModel, Pair, Tokenising, Tokens
from composer.evaluation.scores import Scores, TaskScore
from composer.evaluation.tasks import FEWSHOT_SEED, Items, Split, shut_in, task_score

TOKENS = 2048
"""Most tokens in one forward pass, padding included; a longer text goes alone."""


class LiveScorer:
    """Scores one living model on one split, again and again; requests are built and tokenised once."""

    def __init__(self, model: torch.nn.Module | Engine, tokenizer: Any, split: Split, *, batch_size: int = 16) -> None:
        """Build and tokenise the requests.

        Args:
            model: A causal language model of transformers, or one in an engine; it is asked anew at every call.
            tokenizer: Its tokenizer, which is given a padding token if it has none.
            split: The items.
            batch_size: Most sequences in one forward pass; an engine makes its own batches.

        Raises:
            EvaluationError: if a task or an item cannot be scored with this model.
        """
        self._split = split
        self._lm = likelihood_model(model, tokenizer, batch_size)
        self._requests = {items.name: _requests(items) for items in split.tasks}
        """lm-eval's, by task and item hash."""
        self._pairs: dict[int, Pair] = {}
        """The tokens of a request, by its identity."""
        for name, items in self._requests.items():
            for request in (request for own in items.values() for request in own):
                if request.request_type == "loglikelihood":
                    self._pairs[id(request)] = self._lm.pair(name, *request.args)

    def score(self, subject: str, only: Mapping[str, Collection[str]] | None = None) -> Scores:
        """Score the model as it is now.

        Args:
            subject: Whose scores these are.
            only: The hashes of the items to score, by task; by default all.

        Raises:
            EvaluationError: if a log-likelihood is not finite, or a metric has no number per item.
        """
        chosen: list[tuple[Items, dict[str, list[Any]]]] = []
        for items in self._split.tasks:
            known = self._requests[items.name]
            wanted = set(known if only is None else only.get(items.name, ()))
            chosen.append((items, {item: known[item] for item in items.hashes if item in wanted}))
        requests = [request for _, own in chosen for one in own.values() for request in one]
        self._lm.settle()
        with torch.inference_mode():
            for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
                self._ask(kind, [request for request in requests if request.request_type == kind], subject)
        tasks = tuple(_evaluate(items, own) for items, own in chosen if own)
        return Scores(subject=subject, split=self._split.name, tasks=tasks)

    def answers(self, subject: str) -> tuple[Scores, Answers]:
        """Score the model on the whole split, and return its answers too; arguments and errors as of `score`."""
        scores = self.score(subject)
        found = [task_answers(items, self._requests[items.name], _evaluate) for items in self._split.tasks]
        return scores, Answers(subject=subject, split=self._split.name, tasks=tuple(one for one in found if one))

    @property
    def longest(self) -> int:
        """Tokens of the longest request and what may be written after it, as far as the model reads."""
        sizes = [len(context) + len(after) + 1 for context, after in self._pairs.values()]  # an engine writes one more
        for request in (one for items in self._requests.values() for own in items.values() for one in own):
            if request.request_type == "loglikelihood":
                continue
            settings = request.args[1] if request.request_type == "generate_until" else {"max_gen_toks": 2}
            room = normalize_gen_kwargs(settings, self._lm.max_gen_toks)["max_gen_toks"]
            sizes.append(len(self._lm.tok_encode(request.args[0])) + room)
        return min(max(sizes, default=1), self._lm.max_length)

    def _ask(self, kind: str, requests: list[Any], subject: str) -> None:
        """Leave the model's answers in the requests, as many in each as its task wants."""
        for request in requests:
            request.resps, request.filtered_resps = [], {}
        repeated = [request for request in requests for _ in range(request.repeats)]
        if kind == "loglikelihood":
            answers: list[Any] = self._lm.answers([self._pairs[id(request)] for request in repeated])
        else:
            answers = getattr(self._lm, kind)(repeated, disable_tqdm=True) if repeated else []
        for request, answer in zip(repeated, answers, strict=True):
            if kind != "generate_until" and not isfinite(answer[0] if kind == "loglikelihood" else answer):
                raise EvaluationError(f"{subject}: its log-likelihoods are not finite")
            request.resps.append(answer)


def likelihood_model(model: torch.nn.Module | Engine, tokenizer: Any, batch_size: int) -> LanguageModel:
    """Return a model that answers lm-eval's requests of likelihoods the way `LiveScorer` does.

    lm-eval's own one does not say which tokens are the context, and what is routed by its prompt needs to know.
    """
    if not isinstance(model, torch.nn.Module):
        return EngineModel(model, tokenizer)
    return _Model(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def prompts(split: Split, limit: int) -> dict[str, tuple[str, ...]]:
    """Return what the first items of each task ask, by task, without what is to be answered; no labels are read."""
    return {items.name: tuple(contexts(items.only(items.hashes[:limit])).values()) for items in split.tasks}


def contexts(items: Items) -> dict[str, str]:
    """Return what each item asks, by its hash, without what is to be answered; no labels are read."""
    # Without a context it is the text itself that is predicted.
    return {item: str(own[0].args[0] or own[0].args[1]) for item, own in _requests(items).items()}


def _requests(items: Items) -> dict[str, list[Any]]:
    """Return lm-eval's requests for every item, by its hash."""
    task = items.task
    if getattr(task, "MULTIMODAL", False) or not shut_in(task):
        raise EvaluationError(
            f"task '{items.name}' needs more than text, or runs generated code in no sandbox; choose another one"
        )
    others = getattr(task, "_instances", None)  # the task may be in use elsewhere
    task.set_fewshot_seed(FEWSHOT_SEED)
    with redirect_stderr(StringIO()):  # lm-eval asks nobody whether to show this bar
        task.build_all_requests(samples=list(items.indices))
    requests: dict[str, list[Any]] = {item: [] for item in items.hashes}
    for request in task.instances:
        requests[items.hashes[request.doc_id]].append(request)  # lm-eval counts the chosen documents only
    task._instances = others
    return requests


def _evaluate(items: Items, chosen: dict[str, list[Any]]) -> TaskScore:
    """Return the metric of answered items; of several filters the first counts."""
    task = items.task
    others, task._instances = task._instances, [request for requests in chosen.values() for request in requests]
    task.apply_filters()
    task._instances = others
    indices = dict(zip(items.hashes, items.indices, strict=True))
    rows = []
    for item, requests in chosen.items():
        filtered = [next(iter(request.filtered_resps.values())) for request in requests]
        rows.append({"doc_id": indices[item], **task.process_results(requests[0].doc, filtered)})
    return task_score(items, rows)


class _Model(Tokenising):
    """lm-eval's transformers model with another way to compute log-likelihoods."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.accepts = signature(self.model.forward).parameters
        self.shares = _can_share(self.model, set(self.accepts))
        self.chooses = "Tensor" in str(getattr(self.accepts.get("logits_to_keep"), "annotation", ""))
        """Whether the model computes logits of chosen positions."""

    def settle(self) -> None:
        """Take the model as it is now: it may have moved, or been left in training."""
        self.model.eval()
        self._device = self.model.device

    def _answers(self, pairs: list[Pair]) -> list[Answer]:
        """Answer pairs: those that have their context in common together, all others one by one."""
        answers: dict[int, Answer] = {}
        alone: list[int] = []
        shared: list[list[int]] = []
        groups: dict[Tokens, list[int]] = {}
        for number, (context, _) in enumerate(pairs):
            groups.setdefault(context, []).append(number)
        for context, group in groups.items():
            longest = max(len(pairs[number][1]) for number in group)
            if self.shares and len(group) > 1 and len(context) + longest <= self.max_length + 1:
                shared.append(group)
            else:
                alone += group
        # What is too long loses its left end, as in lm-eval; the last token predicts nothing.
        texts = [sum(pairs[number], ())[-(self.max_length + 1) :][:-1] for number in alone]
        for batch in self._batches([len(text) for text in texts]):
            targets = [pairs[alone[n]][1] for n in batch]
            tables = self._tables([texts[n] for n in batch], [len(target) for target in targets])
            for n, target, table in zip(batch, targets, tables, strict=True):
                answers[alone[n]] = _answer(table, target)
        for batch in self._batches([len(pairs[group[0]][0]) for group in shared]):
            answers.update(self._together([shared[n] for n in batch], pairs))
        return [answers[number] for number in range(len(pairs))]

    def _together(self, groups: list[list[int]], pairs: list[Pair]) -> dict[int, Answer]:
        """Answer groups of pairs, each of which has one context; the longest context comes first.

        All padding is on the right, where what is real does not look; only between a short context and what
        follows it the mask has to hide some.
        """
        contexts = [pairs[group[0]][0] for group in groups]
        cache = DynamicCache(config=self.model.config)
        tables = self._tables(contexts, [1] * len(contexts), past_key_values=cache)
        answers: dict[int, Answer] = {}
        longer: list[tuple[int, int]] = []
        for row, (group, table) in enumerate(zip(groups, tables, strict=True)):
            answers.update({number: _answer(table, pairs[number][1][:1]) for number in group})
            longer += [(row, number) for number in group if len(pairs[number][1]) > 1]
        sizes = [len(pairs[number][1]) - 1 for _, number in longer]
        for batch in self._batches(sizes, len(contexts[0])):
            past = self._past(cache, [longer[n][0] for n in batch], [len(one) for one in contexts], sizes[batch[0]])
            targets = [pairs[longer[n][1]][1] for n in batch]
            tables = self._tables([target[:-1] for target in targets], [sizes[n] for n in batch], **past)
            for n, target, table in zip(batch, targets, tables, strict=True):
                (first, greedy), (rest, on) = answers[longer[n][1]], _answer(table, target[1:])
                answers[longer[n][1]] = first + rest, greedy and on
        return answers

    def _past(self, cache: DynamicCache, rows: list[int], lengths: list[int], size: int) -> dict[str, Any]:
        """Return what the model needs to read `size` more tokens after some rows of a cache, which stays as it is."""
        past = DynamicCache(config=self.model.config)
        for number, layer in enumerate(cache.layers):
            past.update(layer.keys[rows], layer.values[rows], number)
        ends = torch.tensor([[lengths[row]] for row in rows], device=self.device)
        columns = torch.arange(lengths[0] + size, device=self.device)
        positions = ends + columns[:size]
        return {
            "past_key_values": past,
            "attention_mask": ((columns < ends) | (columns >= lengths[0])).long(),
            "position_ids": positions.clamp(max=self.max_length - 1),  # padding may reach beyond the last one
        }

    def _tables(self, texts: list[Tokens], counts: list[int], **options: Any) -> Iterator[torch.Tensor]:
        """Return for each text the log-probabilities after each of its last `count` tokens; the longest comes first."""
        starts = [len(text) - count for text, count in zip(texts, counts, strict=True)]
        kept: Sequence[int] = range(len(texts[0]))
        if self.chooses:
            kept = sorted({start + n for start, count in zip(starts, counts, strict=True) for n in range(count)})
            options["logits_to_keep"] = torch.tensor(kept, device=self.device)
        if "use_cache" in self.accepts:
            options["use_cache"] = "past_key_values" in options
        if "prompt_mask" in self.accepts:  # a mixture that is routed by the prompt: the context, without padding
            ends = torch.tensor([start + 1 for start in starts], device=self.device)
            options["prompt_mask"] = torch.arange(len(texts[0]), device=self.device) < ends[:, None]
        padded = [text + (0,) * (len(texts[0]) - len(text)) for text in texts]
        logits = self.model(torch.tensor(padded, device=self.device), **options).logits
        places = [kept.index(start) for start in starts]
        return (
            torch.log_softmax(logits[row, place : place + count], dim=-1, dtype=torch.float32)
            for row, (place, count) in enumerate(zip(places, counts, strict=True))
        )

    def _batches(self, lengths: Sequence[int], before: int = 0) -> Iterator[list[int]]:
        """Yield the numbers of texts of about the same length, the longest first."""
        batch: list[int] = []
        for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
            if batch and len(batch) >= min(self.batch_size, TOKENS // (before + lengths[batch[0]])):
                yield batch
                batch = []
            batch.append(number)
        if batch:
            yield batch


def _answer(table: torch.Tensor, target: Tokens) -> Answer:
    """Return what log-probabilities say of the tokens that did follow."""
    tokens = torch.tensor(target, device=table.device)
    return float(table.gather(1, tokens[:, None]).sum()), bool((table.argmax(dim=1) == tokens).all())


def _can_share(model: Any, accepts: set[str]) -> bool:
    """Return whether a context that was read once surely serves all that follows it.

    It does where its whole past is in a plain cache, the mask is made by transformers' common code, and positions can
    be given; so not with windows and recurrent states, nor where rotations depend on the length of the text.
    """
    if not {"past_key_values", "attention_mask", "position_ids"} <= accepts or not model._supports_attention_backend:
        return False
    rotations = str(getattr(model.config.get_text_config(decoder=True), "rope_parameters", None))
    if "dynamic" in rotations or "longrope" in rotations:
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
