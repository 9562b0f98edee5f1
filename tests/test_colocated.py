"""Co-located experts: in one engine each answers as it does alone, and none answers for another."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from composer.artefacts import Store
from composer.serving.colocated import arguments, environment, obstacle, request
from composer.serving.colocated.groups import Groups
from composer.serving.supervisor import free_port
from composer.zoo import Checkpoint, inspect_checkpoint
from tests.conftest import MODELS, ROOT

GUARD = ROOT / "composer" / "serving" / "guard.py"
LONG = "Once upon a time there was a little girl who had a red ball and a friend in the old house. " * 6
PROMPTS = ("Once upon a time", "3 + 4 =", "The law says that", "<a href=", "def main(", "Tom and Mia went", "KING:")


# Whether they can


def test_fine_tunes_of_one_base_can_share_an_engine(quick: dict[str, Checkpoint]) -> None:
    assert obstacle([quick["stories"], quick["stories-math"], quick["stories-web"]]) is None
    assert obstacle([quick["script"], quick["script-code"]]) is None


def test_what_differs_is_named(quick: dict[str, Checkpoint]) -> None:
    one = quick["stories"]
    assert "differ in architecture: LlamaForCausalLM and Qwen2ForCausalLM" in (obstacle([one, quick["script"]]) or "")
    for field, words in (
        ("layers", "layers"),
        ("hidden_size", "hidden size"),
        ("heads", "heads"),
        ("kv_heads", "key-value heads"),
        ("intermediate_size", "intermediate size"),
        ("vocabulary_size", "vocabulary size"),
    ):
        other = one.model_copy(update={"id": "other", field: 7})
        assert obstacle([one, other]) == f"'stories' and 'other' differ in {words}: {getattr(one, field)} and 7"
    for part in ("vocabulary", "merges", "added_tokens", "special_tokens", "chat_template"):
        tokenizer = one.tokenizer.model_copy(update={part: "other"})
        words = f"tokenizers that differ in {part.replace('_', ' ')}"
        assert words in (obstacle([one, one.model_copy(update={"tokenizer": tokenizer})]) or "")
    assert "is quantised (gptq)" in (obstacle([one, one.model_copy(update={"quantisation": "gptq"})]) or "")
    assert "Python code" in (obstacle([one, one.model_copy(update={"remote_code": True})]) or "")
    gemma = one.model_copy(update={"architecture": "GemmaForCausalLM"})
    assert "'stories' is a GemmaForCausalLM; engines are shared by Llama" in (obstacle([gemma, gemma]) or "")
    assert "more than the 256" in (obstacle([one] * 257) or "")


def test_storage_types_matter_only_where_the_engine_takes_them_over(quick: dict[str, Checkpoint]) -> None:
    one = quick["stories"]
    other = one.model_copy(update={"dtype": "F32"})
    assert "stored in BF16 and F32; set serve.dtype" in (obstacle([one, other]) or "")
    assert obstacle([one, other], dtype="float32") is None


def test_what_is_only_in_files_is_compared_too(tmp_path: Path, quick: dict[str, Checkpoint], store: Store) -> None:
    def changed(name: str, file: str, **changes: Any) -> Checkpoint:
        return inspect_checkpoint(name, copy_of("stories", tmp_path / name, {file: changes}), store)

    one = quick["stories"]
    own = changed("own", "config.json", rms_norm_eps=1e-3, rope_parameters={"rope_theta": 9.0, "rope_type": "default"})
    assert obstacle([one, own]) is None
    assert "sliding window" in (
        obstacle([one, changed("window", "config.json", layer_types=["sliding_attention"])]) or ""
    )
    assert "another kind (qk_norm" in (obstacle([one, changed("norm", "config.json", qk_norm=True)]) or "")
    assert "differ in head size: 32 and 8" in (obstacle([one, changed("head", "config.json", head_dim=8)]) or "")
    assert "differ in treatment" in (obstacle([one, changed("bos", "tokenizer_config.json", add_bos_token=True)]) or "")
    assert "differ in the default of eos_token_id: 2 and 3" in (
        obstacle([one, changed("eos", "generation_config.json", eos_token_id=3)]) or ""
    )


def test_rows_come_back_where_they_were() -> None:
    generator = torch.Generator().manual_seed(0)
    for experts in (1, 2, 5):
        owners = torch.randint(experts, (40,), generator=generator)
        rows = torch.stack([owners.float(), torch.arange(40.0)], dim=1)
        groups = Groups.of(owners)
        parts = groups.split(rows)
        assert torch.equal(groups.join(parts), rows)
        assert [part[:, 0].unique().tolist() for part in parts] == [[expert] for expert in groups.experts]
        assert [len(part) for part in parts] == groups.sizes


# What they answer


def copy_of(name: str, target: Path, changes: dict[str, dict[str, Any]]) -> Path:
    """A quickstart model with other settings, by file."""
    shutil.copytree(MODELS / name, target)
    for file, values in changes.items():
        content = json.loads((target / file).read_text())
        (target / file).write_text(json.dumps({**content, **values}))
    return target


def untied(name: str, target: Path, **changes: Any) -> Path:
    """A quickstart model with an output head of its own."""
    copy_of(name, target, {"config.json": {"tie_word_embeddings": False, **changes}})
    weights = load_file(target / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(1).contiguous()
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture(scope="session")
def plugged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which vLLM finds us, whether or not the entry point is installed."""
    paths = [str(ROOT)]
    found = entry_points(group="vllm.general_plugins")
    if not any(one.value == "composer.serving.colocated.plugin:register" for one in found):
        info = tmp_path_factory.mktemp("plugins") / "model_composer_tests.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: model-composer-tests\nVersion: 0\n")
        point = "model-composer = composer.serving.colocated.plugin:register"
        (info / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{point}\n")
        paths.append(str(info.parent))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


Ask = tuple[int, str, dict[str, Any]]
"""The expert's index, the prompt, and the sampling."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Experts, and what is asked of them."""

    experts: tuple[Path, ...]
    batches: list[list[Ask]]
    engine: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What all engines of the case are told."""
    shared: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What only the shared one is told."""

    def together(self) -> dict[str, Any]:
        """All of it, by one engine."""
        words = arguments([_Named(path) for path in self.experts])  # type: ignore[misc]
        engine = {
            "model": str(self.experts[0]),
            "hf_overrides": json.loads(words[words.index("--hf-overrides") + 1]),
            "logits_processors": [words[words.index("--logits-processors") + 1]],
        }
        asked = [[{"expert": one, "prompt": text, "sampling": how} for one, text, how in part] for part in self.batches]
        return {"engine": {**self.engine, **self.shared, **engine}, "batches": asked}

    def alone(self, index: int) -> dict[str, Any]:
        """What one expert is asked, by an engine of its own."""
        asked = [
            [{"expert": None, "prompt": text, "sampling": how} for one, text, how in part if one == index]
            for part in self.batches
        ]
        return {"engine": {**self.engine, "model": str(self.experts[index])}, "batches": asked}


class _Named:
    """As much of a checkpoint as a command line needs."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.architecture = json.loads((path / "config.json").read_text())["architectures"][0]


def greedy(count: int, **more: Any) -> dict[str, Any]:
    return {"temperature": 0, "max_tokens": count, "ignore_eos": True, **more}


def crowd(experts: int) -> list[Ask]:
    """Short and long prompts for all experts in turn, of which each ends at another time."""
    return [
        (expert, prompt, greedy(5 + 7 * (place % 4) + 3 * expert))
        for place, prompt in enumerate((*PROMPTS[:4], LONG, *PROMPTS[4:]))
        for expert in range(experts)
    ]


def growing(experts: int) -> list[Ask]:
    """Prompts of a little less than a block of the key-value cache (128 tokens), each of which needs another one."""
    return [(one, LONG[place : place + 260], greedy(60)) for place in range(4) for one in range(experts)]


def everything(experts: int) -> list[list[Ask]]:
    """All that is asked of the experts that are looked at most closely."""
    seeded = {"temperature": 1.0, "seed": 7, "top_p": 0.9, "top_k": 50, "max_tokens": 30, "ignore_eos": True}
    scored = greedy(12, logprobs=5, prompt_logprobs=2)
    everyone = range(experts)
    return [
        crowd(experts),
        [(one, prompt, scored) for prompt in (*PROMPTS, LONG[9:]) for one in everyone],
        [(one, prompt, seeded) for prompt in PROMPTS for one in everyone],
        [(one, PROMPTS[0], greedy(30, repetition_penalty=1.3, min_tokens=3)) for one in everyone],
        *([(one, LONG[5:], greedy(20))] for _ in range(2) for one in everyone),
    ]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Which experts are put together."""
    directory = tmp_path_factory.mktemp("experts")
    stories = tuple(MODELS / name for name in ("stories", "stories-math", "stories-web"))
    own = {"rms_norm_eps": 1e-3, "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}
    mistral = {"config.json": {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}}
    mistrals = tuple(copy_of(name, directory / f"m-{name}", mistral) for name in ("stories-law", "stories-math"))
    heads = (stories[0], untied("stories-math", directory / "untied", **own), untied("stories", directory / "untied-0"))
    block = 5 * 2 * 4 * 32 * 4 * 128  # bytes: layers, keys and values, heads, head size, float32, tokens
    return {
        "tied": Case(stories, everything(3)),
        "untied": Case(heads, everything(3)),
        "bfloat16": Case(stories[:2], [crowd(2)], {"dtype": "bfloat16"}),
        "qwen2": Case((MODELS / "script-code", MODELS / "script-play"), everything(2)),
        "mistral": Case(mistrals, [crowd(2)]),
        "crowded": Case(stories, [growing(3)], shared={"kv_cache_memory_bytes": 8 * block}),
    }


@pytest.fixture(scope="module")
def runs(
    cases: dict[str, Case], plugged: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What all engines answered: the shared one of each case, those of single experts, and one that cannot start."""
    pytest.importorskip("vllm")
    directory = tmp_path_factory.mktemp("runs")
    short = copy_of("stories-math", directory / "short", {"config.json": {"max_position_embeddings": 256}})
    unfit = Case((MODELS / "stories", short), []).together()
    asked = [*(case.together() for case in cases.values()), *_merged(cases), unfit]
    (directory / "runs.json").write_text(json.dumps(asked))
    script = ROOT / "tests" / "vllm_runs.py"
    command = [sys.executable, str(script), str(directory / "runs.json"), str(directory / "answers.json")]
    done = subprocess.run(command, env=plugged, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return list(json.loads((directory / "answers.json").read_text()))


def _merged(cases: dict[str, Case]) -> list[dict[str, Any]]:
    """The runs of single experts; what cases ask of the same engine is asked of one."""
    merged: dict[str, dict[str, Any]] = {}
    for case in cases.values():
        for index in range(len(case.experts)):
            run = case.alone(index)
            merged.setdefault(json.dumps(run["engine"]), {**run, "batches": []})["batches"] += run["batches"]
    return list(merged.values())


@pytest.fixture(scope="module")
def together(cases: dict[str, Case], runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the shared engines answered, by case."""
    return dict(zip(cases, runs, strict=False))


@pytest.fixture(scope="module")
def alone(cases: dict[str, Case], runs: list[dict[str, Any]]) -> dict[tuple[str, int], list[list[dict[str, Any]]]]:
    """What the experts answered alone, by case and expert."""
    answers = {
        json.dumps(run["engine"]): iter(answer["batches"])
        for run, answer in zip(_merged(cases), runs[len(cases) : -1], strict=True)
    }
    return {
        (name, index): [next(answers[json.dumps(case.alone(index)["engine"])]) for _ in case.batches]
        for name, case in cases.items()
        for index in range(len(case.experts))
    }


CASES = ("tied", "untied", "bfloat16", "qwen2", "mistral", "crowded")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_each_answers_as_it_does_alone(
    name: str,
    cases: dict[str, Case],
    together: dict[str, dict[str, Any]],
    alone: dict[tuple[str, int], list[list[dict[str, Any]]]],
) -> None:
    for batch, asked in enumerate(cases[name].batches):
        theirs = [iter(alone[name, index][batch]) for index in range(len(cases[name].experts))]
        for (expert, _, _), mine in zip(asked, together[name]["batches"][batch], strict=True):
            same(mine, next(theirs[expert]))


def same(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Compare two answers: tokens, and log-probabilities and ranks of answer and prompt."""
    assert mine["tokens"] == theirs["tokens"]
    for part in ("logprobs", "prompt"):
        for one, other in zip(mine[part], theirs[part], strict=True):
            assert one.keys() == other.keys()
            for token, (logprob, rank) in one.items():
                assert logprob == pytest.approx(other[token][0], abs=1e-4)
                assert rank == other[token][1]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_experts_answers_differ(name: str, cases: dict[str, Case], together: dict[str, dict[str, Any]]) -> None:
    """Else the test above could not tell one from another."""
    by_prompt: dict[str, set[str]] = {}
    for (_, prompt, _), answer in zip(cases[name].batches[0], together[name]["batches"][0], strict=True):
        by_prompt.setdefault(prompt, set()).add(str(answer["tokens"][:5]))
    assert sum(len(found) > 1 for found in by_prompt.values()) >= len(by_prompt) - 1


@pytest.mark.slow
def test_a_prompt_is_remembered_for_the_expert_that_read_it(
    cases: dict[str, Case], together: dict[str, dict[str, Any]]
) -> None:
    for name in ("tied", "untied", "qwen2"):
        experts = len(cases[name].experts)
        cached = [batch[0]["cached"] for batch in together[name]["batches"][4:]]
        assert cached[:experts] == [0] * experts
        assert min(cached[experts:]) >= 128


@pytest.mark.slow
def test_requests_that_had_to_make_room_carry_on_with_their_expert(together: dict[str, dict[str, Any]]) -> None:
    assert together["crowded"]["preempted"] > 0
    assert together["tied"]["preempted"] == 0


@pytest.mark.slow
def test_an_expert_that_takes_less_than_the_engine_stops_the_start(runs: list[dict[str, Any]]) -> None:
    assert runs[-1]["error"] == "the expert short takes 256 tokens; start the engine with --max-model-len 256"


# The server


@pytest.fixture(scope="module")
def server(
    quick: dict[str, Checkpoint], plugged: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The address of one engine with three experts."""
    pytest.importorskip("vllm")
    experts = [quick[name] for name in ("stories", "stories-math", "stories-web")]
    port = free_port()
    command = [
        sys.executable, "-S", str(GUARD), sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", experts[0].path, "--served-model-name", "several", "--host", "127.0.0.1", "--port", str(port),
        "--max-model-len", "512", "--dtype", "float32", "--kv-cache-memory-bytes", str(64 << 20),
        "--max-num-batched-tokens", "96", "--max-num-seqs", "8", *arguments(experts),
    ]  # fmt: skip
    own = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    log = tmp_path_factory.mktemp("logs") / "engine.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=output, env={**plugged, **own, **environment()}
        )
    try:
        url = f"http://127.0.0.1:{port}"
        end = time.monotonic() + 300
        while True:
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.2)
        yield url
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(30)


def ask(url: str, path: str = "completions", **body: Any) -> httpx.Response:
    return httpx.post(
        f"{url}/v1/{path}", json={"model": "several", "max_tokens": 8, "temperature": 0, **body}, timeout=60
    )


@pytest.mark.slow
@pytest.mark.parametrize("given", [-1, 3, 99, "1", 0.5, 1.0, [1], None])
def test_an_expert_that_is_not_there_is_refused(server: str, given: Any) -> None:
    answer = ask(server, prompt="a", vllm_xargs={"expert": given})
    assert answer.status_code == 400
    if given is not None:
        assert "give the index of one of the experts, 0 to 2" in answer.json()["error"]["message"]


@pytest.mark.slow
def test_a_request_to_none_in_particular_is_refused(server: str) -> None:
    for answer in (
        ask(server, prompt="a"),
        ask(server, prompt="a", vllm_xargs={"other": 1}),
        ask(server, "chat/completions", messages=[{"role": "user", "content": "a"}]),
        ask(server, prompt="a", use_beam_search=True, n=2, **request(1)),
    ):
        assert answer.status_code == 400
        assert "'expert' in 'vllm_xargs' is None" in answer.json()["error"]["message"]
    assert ask(server, prompt="a", **request(2)).status_code == 200, "and the engine lives on"


@pytest.mark.slow
def test_mixed_requests_at_once_are_answered_as_one_by_one(server: str) -> None:
    bodies = [{"prompt": prompt, "max_tokens": 24, **request(one)} for prompt in (*PROMPTS, LONG) for one in range(3)]
    one_by_one = [ask(server, **body).json()["choices"][0]["text"] for body in bodies]
    with ThreadPoolExecutor(8) as pool:
        at_once = [answer.json()["choices"][0]["text"] for answer in pool.map(lambda body: ask(server, **body), bodies)]
    assert at_once == one_by_one
    assert len(set(one_by_one)) > 2 * len(PROMPTS)


@pytest.mark.slow
def test_chat_streams_what_it_answers_whole(server: str) -> None:
    texts = []
    for one in range(3):
        body = {"messages": [{"role": "user", "content": PROMPTS[0]}], "max_tokens": 20, **request(one)}
        whole = ask(server, "chat/completions", **body).json()["choices"][0]["message"]["content"]
        streamed = ask(server, "chat/completions", stream=True, **body).text
        events = [line.removeprefix("data: ") for line in streamed.splitlines() if line.startswith("data: {")]
        deltas = [json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events]
        assert "".join(deltas) == whole
        assert len([delta for delta in deltas if delta]) > 3
        texts.append(whole)
    assert len(set(texts)) == 3


@pytest.mark.slow
def test_prompts_are_scored_by_their_expert(
    server: str, cases: dict[str, Case], alone: dict[tuple[str, int], list[list[dict[str, Any]]]]
) -> None:
    _, prompt, _ = cases["tied"].batches[1][0]
    sums = set()
    for one in range(3):
        scored = ask(server, prompt=prompt, echo=True, logprobs=0, max_tokens=1, **request(one)).json()
        found = scored["choices"][0]["logprobs"]["token_logprobs"][1:-1]
        for mine, theirs in zip(found, alone["tied", one][1][0]["prompt"][1:], strict=True):
            assert any(mine == pytest.approx(logprob, abs=1e-4) for logprob, _ in theirs.values())
        sums.add(round(sum(found), 3))
    assert len(sums) == 3
