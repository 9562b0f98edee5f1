"""Runs requests through vLLM engines, one engine after another, in a process of its own.

    python vllm_runs.py RUNS.json ANSWERS.json

A run is `{"engine": {arguments of vllm.LLM}, "batches": [[request]]}`, a request `{"prompt", "expert", "sampling"}`,
where the prompt is a text or tokens, and the expert its index among co-located ones or None. An answer is the tokens,
their log-probabilities, those of the prompt, and how many tokens of the prompt came from the prefix cache. An engine
that does not start answers with its error.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
}

SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "kv_cache_memory_bytes": 64 << 20,
    "max_model_len": 512,
    "max_num_seqs": 6,
    "max_num_batched_tokens": 96,
    "disable_log_stats": False,
}
"""Batches are smaller than the long prompts and the crowds of requests in the tests: prompts are read in chunks,
requests wait, join, leave and move."""


def main(runs: Path, answers: Path) -> None:
    answers.write_text(json.dumps([_run(one) for one in json.loads(runs.read_text())]))


def _run(run: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM

    try:
        llm = LLM(**{**SETTINGS, **run["engine"]})
    except ValueError as error:
        return {"error": str(error)}
    answers = [_batch(llm, batch) for batch in run["batches"]]
    preempted = sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")
    del llm
    gc.collect()
    return {"batches": answers, "preempted": preempted}


def _batch(llm: Any, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    from composer.serving.colocated import request

    prompts, sampling = [], []
    for one in batch:
        extra = {} if one["expert"] is None else request(one["expert"])
        salt = {"cache_salt": extra["cache_salt"]} if extra else {}
        form = "prompt" if isinstance(one["prompt"], str) else "prompt_token_ids"
        prompts.append({form: one["prompt"], **salt})
        sampling.append(SamplingParams(**one["sampling"], extra_args=extra.get("vllm_xargs")))
    return [_answer(output) for output in llm.generate(prompts, sampling, use_tqdm=False)]


def _answer(output: Any) -> dict[str, Any]:
    only = output.outputs[0]
    return {
        "tokens": list(only.token_ids),
        "logprobs": _table(only.logprobs),
        "prompt": _table(output.prompt_logprobs),
        "cached": output.num_cached_tokens,
    }


def _table(places: Any) -> list[dict[str, tuple[float, int]]]:
    """For each place, log-probability and rank by token."""
    return [{str(token): (one.logprob, one.rank) for token, one in (place or {}).items()} for place in places or []]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
