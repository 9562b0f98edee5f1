"""The process of a living engine: run as a module with its settings, it answers calls until its caller hangs up."""

import json
import os
import sys
from collections.abc import Callable
from multiprocessing.connection import Listener
from typing import TYPE_CHECKING, Any

from composer.errors import first_line
from composer.serving.engines.machine import has_gpu

if TYPE_CHECKING:
    from vllm import LLM

SEQUENCES = 32
"""Most sequences at a time on a CPU."""


def main(settings: dict[str, Any]) -> None:
    """Start the engine and answer."""
    key = os.environ.pop("COMPOSER_ENGINE_KEY").encode()
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if not has_gpu():
        os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "MALLOC_ARENA_MAX": "2"}
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # this is the engine's own process already
    with Listener(settings["address"], "AF_UNIX", authkey=key) as listener, listener.accept() as connection:
        engine = _engine(settings)
        connection.send((True, engine.model_config.max_model_len))
        while True:
            try:
                method, arguments = connection.recv()
            except EOFError:
                return
            try:
                answer = True, _CALLS[method](engine, *arguments)
            except Exception as error:
                answer = False, first_line(error)
            connection.send(answer)


def _engine(settings: dict[str, Any]) -> "LLM":
    from vllm import LLM

    options: dict[str, Any] = {"dtype": settings["dtype"], "gpu_memory_utilization": settings["share"]}
    if not has_gpu():
        options = {
            "dtype": "float32" if settings["dtype"] == "auto" else settings["dtype"],
            "enforce_eager": True,
            "kv_cache_memory_bytes": settings["kv_cache_mb"] << 20,
            "max_num_seqs": SEQUENCES,
        }
    return LLM(
        model=settings["model"],
        max_model_len=settings["max_model_len"],
        worker_extension_cls="composer.serving.swap_worker.SwapWorker",
        **options,
    )


def _swap(engine: "LLM", directory: str) -> None:
    engine.collective_rpc("swap_weights", args=(directory,))
    # Reloading leaves keys and values in the prefix cache that the old weights computed.
    if not engine.reset_prefix_cache():
        raise RuntimeError("the prefix cache could not be reset")


def _score(engine: "LLM", pairs: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[tuple[float, bool]]:
    from vllm import SamplingParams

    longest = engine.model_config.max_model_len - 1  # one token is always generated
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    prompts = [(context + continuation)[-longest:] for context, continuation in pairs]
    answers = []
    for output, (_, continuation) in zip(_generate(engine, prompts, sampling), pairs, strict=True):
        start = max(1, len(output.prompt_token_ids) - len(continuation))  # nothing predicts the first token
        places = zip(output.prompt_token_ids[start:], output.prompt_logprobs[start:], strict=True)
        found = [place[token] for token, place in places]
        answers.append((sum(one.logprob for one in found), all(one.rank == 1 for one in found)))
    return answers


def _complete(
    engine: "LLM", prompts: list[tuple[int, ...]], max_tokens: int, stop: list[str]
) -> list[tuple[str, list[int]]]:
    from vllm import SamplingParams

    room = max(1, engine.model_config.max_model_len - max_tokens)
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, stop=stop or None)
    outputs = _generate(engine, [prompt[-room:] for prompt in prompts], sampling)
    return [(output.outputs[0].text, list(output.outputs[0].token_ids)) for output in outputs]


def _generate(engine: "LLM", prompts: list[tuple[int, ...]], sampling: Any) -> list[Any]:
    return list(engine.generate([{"prompt_token_ids": list(one)} for one in prompts], sampling, use_tqdm=False))


_CALLS: dict[str, Callable[..., Any]] = {"swap": _swap, "score": _score, "complete": _complete}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
