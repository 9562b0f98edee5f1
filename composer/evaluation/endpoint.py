"""Scoring a served composite through its OpenAI API.

lm-eval's own API models cut log-likelihoods with one tokenizer for all; behind one name there are several.
Here every question is routed on its context alone, so all choices of a question meet the same expert, and that
expert's own tokenizer cuts context and continuation.
"""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
from lm_eval.api.model import LM, TemplateLM
from lm_eval.models.utils import has_bos_prefix

from composer.errors import EvaluationError
from composer.evaluation.lm import IMPOSSIBLE
from composer.mixture import Composite, Expert
from composer.progress import Progress, Step, silent

if TYPE_CHECKING:
    from composer.serving.server import Endpoint

TOGETHER = 64
"""Sequences that are asked for at a time, in as many requests as it takes: the engine batches them."""
SEQUENCES = 16
"""Prompts of one request, at most."""
PATIENCE = 300.0
"""Seconds to wait for an engine that is being started again."""
TIMEOUT = 600.0
"""Seconds one request may take; a batch of long prompts on a busy CPU takes a while."""


class ExpertModel(TemplateLM):  # type: ignore[misc]
    """One expert behind the endpoint, cut by its own tokenizer."""

    together = TOGETHER

    def __init__(self, expert: Expert, max_length: int, client: httpx.Client, batch_size: int) -> None:
        """Load the expert's tokenizer; weights stay where they are."""
        from transformers import AutoTokenizer

        super().__init__()
        self.name = expert.id
        checkpoint = expert.checkpoint
        self.tokenizer = AutoTokenizer.from_pretrained(
            checkpoint.path, local_files_only=True, trust_remote_code=checkpoint.remote_code
        )
        self.max_length = max_length
        self.client = client
        self.batch_size = batch_size

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before an empty context: BOS, else EOS."""
        bos = self.tokenizer.bos_token_id
        return int(bos) if bos is not None else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokenise as lm-eval's transformers model does: special tokens as the tokenizer has them, BOS once."""
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            options["add_special_tokens"] = False
        return list(self.tokenizer.encode(string, **options))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        size, longest = min(self.batch_size, SEQUENCES), self.max_length - 1
        read = [request for request in requests if len(request[2]) <= longest]
        batches = [read[start : start + size] for start in range(0, len(read), size)]
        with ThreadPoolExecutor(max(1, self.together // size)) as pool:
            found = iter([one for part in pool.map(self._likelihoods, batches) for one in part])
        return [next(found) if len(request[2]) <= longest else IMPOSSIBLE for request in requests]

    def _likelihoods(self, batch: list[tuple[tuple[str, str], list[int], list[int]]]) -> list[tuple[float, bool]]:
        # Too long ones lose context on the left, as with lm-eval's own models.
        prompts = [(context + continuation)[-(self.max_length - 1) :] for _, context, continuation in batch]
        body = {
            "model": self.name,
            "prompt": prompts,
            "max_tokens": 0,
            "echo": True,
            "logprobs": 1,
            "temperature": 0,
        }
        choices = _post(self.client, "/v1/completions", body)["choices"]
        ordered = sorted(choices, key=lambda choice: choice["index"])
        return [
            _likelihood(choice, len(prompt), len(continuation), self.name)
            for (_, _, continuation), prompt, choice in zip(batch, prompts, ordered, strict=True)
        ]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Refuse: no task of this kind is scored through a router, which needs a context to decide on."""
        raise EvaluationError("tasks of type loglikelihood_rolling have no context to route on; choose others")

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate greedily, or as a request's own settings say, until one of its stop sequences."""
        with ThreadPoolExecutor(self.together) as pool:
            return list(pool.map(self._generate, requests))

    def _generate(self, request: Any) -> str:
        context, settings = request.args
        limit = int(settings.get("max_gen_toks", 256))
        until = settings.get("until") or []
        stop = [until] if isinstance(until, str) else list(until)
        body = {
            "model": self.name,
            "prompt": self.prompt(context, self.max_length - limit),
            "max_tokens": limit,
            "temperature": settings.get("temperature", 0) if settings.get("do_sample") else 0,
            "stop": stop[:4],
        }
        text: str = _post(self.client, "/v1/completions", body)["choices"][0]["text"]
        for end in filter(None, stop):  # engines take four at most, and some take none
            text = text.split(end)[0]
        return text

    def prompt(self, context: str, room: int) -> list[int] | str:
        """Return a context as the engine takes it, at most so many tokens of its end."""
        return self.tok_encode(context)[-room:]


class ComposedModel(LM):  # type: ignore[misc]
    """The composite as lm-eval sees it: routes each request on its context, then asks that expert."""

    def __init__(
        self,
        endpoint: "Endpoint",
        composite: Composite,
        *,
        batch_size: int = 16,
        dtype: str | None = None,
        progress: Progress = silent,
    ) -> None:
        """Connect to a served composite.

        Raises:
            EvaluationError: if the endpoint does not give log-probabilities of prompts.
        """
        super().__init__()
        self.client = httpx.Client(base_url=endpoint.url, timeout=TIMEOUT, trust_env=False, headers=endpoint.headers)
        self.progress = progress
        self.routed: dict[str, Counter[str]] = {}
        """For each task: how many items each expert got."""
        self._seen: set[tuple[str, int]] = set()
        self.experts: dict[str, Any] = {
            expert.id: self._expert(endpoint, expert, batch_size, dtype) for expert in composite.experts
        }

    def _expert(self, endpoint: "Endpoint", expert: Expert, batch_size: int, dtype: str | None) -> Any:
        length = endpoint.max_model_len[expert.id]
        if not endpoint.scores_prompts:
            return _local_expert(expert, length, self.client, batch_size, dtype)
        model = ExpertModel(expert, length, self.client, batch_size)
        self._check_echo(model)
        return model

    def _check_echo(self, expert: ExpertModel) -> None:
        """Ask once for the log-probabilities of a prompt: a server that ignores `echo` gives chance-level scores."""
        ids = expert.tok_encode("the quick brown fox")
        expert._loglikelihood_tokens([(("", ""), ids[:1], ids[1:])])

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return log-likelihood and greediness of each (context, continuation)."""
        return self._by_expert(requests, "loglikelihood")

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the generated text for each context."""
        return self._by_expert(requests, "generate_until")

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Refuse: there is no context to route on."""
        raise EvaluationError("tasks of type loglikelihood_rolling have no context to route on; choose others")

    def _by_expert(self, requests: list[Any], method: str) -> list[Any]:
        chosen = self._route([request.args[0] for request in requests])
        for request, expert in zip(requests, chosen, strict=True):
            if (request.task_name, request.doc_id) not in self._seen:
                self._seen.add((request.task_name, request.doc_id))
                self.routed.setdefault(request.task_name, Counter())[expert] += 1
        results: list[Any] = [None] * len(requests)
        done = 0
        for name, expert in self.experts.items():
            places = [index for index, choice in enumerate(chosen) if choice == name]
            for start in range(0, len(places), 256):
                part = places[start : start + 256]
                answers = getattr(expert, method)([requests[i] for i in part], disable_tqdm=True)
                for place, answer in zip(part, answers, strict=True):
                    results[place] = answer
                done += len(part)
                message = f"{requests[0].task_name} through the endpoint"
                self.progress(Step(stage="evaluate", message=message, done=done, total=len(requests)))
        return results

    def _route(self, contexts: list[str]) -> list[str]:
        unique = list(dict.fromkeys(contexts))
        experts: dict[str, str] = {}
        for start in range(0, len(unique), 64):
            part = unique[start : start + 64]
            self.progress(Step(stage="evaluate", message="routing", done=start, total=len(unique)))
            data = _post(self.client, "/v1/route", {"input": part})["data"]
            experts.update({text: decision["expert"] for text, decision in zip(part, data, strict=True)})
        return [experts[context] for context in contexts]


def _local_expert(expert: Expert, max_length: int, client: httpx.Client, batch_size: int, dtype: str | None) -> Any:
    """Return an expert whose likelihoods are computed here, since its engine gives none for prompts."""
    import torch

    from composer.evaluation.in_process import load_model
    from composer.evaluation.live import likelihood_model

    class LocalLikelihoods(ExpertModel):
        together = 1  # such engines answer one after another

        def __init__(self) -> None:
            super().__init__(expert, max_length, client, batch_size)
            loaded = load_model(expert.checkpoint, batch_size, dtype)
            self.model = likelihood_model(loaded.model, loaded.tokenizer, batch_size)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            with torch.inference_mode():
                return self.model.loglikelihood(requests, disable_tqdm=True)

        def prompt(self, context: str, room: int) -> str:
            tokens = self.tok_encode(context)  # such engines take text only
            return context if len(tokens) <= room else str(self.tokenizer.decode(tokens[-room:]))

    return LocalLikelihoods()


def _likelihood(choice: dict[str, Any], prompt: int, continuation: int, expert: str) -> tuple[float, bool]:
    """Sum the log-probabilities of the last `continuation` of a prompt's tokens (nats)."""
    logprobs = choice.get("logprobs") or {}
    values = (logprobs.get("token_logprobs") or [])[:prompt]
    if len(values) != prompt:
        raise EvaluationError(
            f"expert '{expert}': the engine gave log-probabilities of {len(values)} of {prompt} prompt tokens; "
            "it ignores 'echo', so its scores would mean nothing"
        )
    start = max(0, prompt - continuation)
    best = logprobs.get("top_logprobs") or [None] * prompt
    greedy = all(
        value >= max(top.values()) - 1e-9
        for value, top in zip(values[start:], best[start:prompt], strict=True)
        if value is not None and top
    )
    return sum(value for value in values[start:] if value is not None), greedy


def _post(client: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            answer = client.post(path, json=body)
        except httpx.TransportError as error:
            raise EvaluationError(f"the endpoint {client.base_url} does not answer: {error}") from error
        if answer.status_code not in (429, 503) or time.monotonic() > end:
            break
        time.sleep(min(5.0, float(answer.headers.get("retry-after", 1))))  # an engine is being started again
    if answer.status_code != 200:
        raise EvaluationError(f"the endpoint refused {path} ({answer.status_code}): {answer.text[:300]}")
    result: dict[str, Any] = answer.json()
    return result
