"""Scoring a living model: the numbers are those of lm-eval's own transformers model, at less cost."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from composer.errors import EvaluationError
from composer.evaluation import live
from composer.evaluation.in_process import load_model
from composer.evaluation.live import FEWSHOT_SEED, LiveScorer
from composer.evaluation.tasks import Split, load_split, run_tasks
from composer.zoo import Checkpoint
from tests.conftest import MODELS, QUICKSTART

STORY = "Once upon a time there was a little girl who lived near the woods. "
LIKELIHOODS = ["letters", "words", "open", "empty", "long", "mutual", "uneven"]
"""All tasks of `folder` whose requests are log-likelihoods."""

LOADER = """
import json
from pathlib import Path

import datasets


def load(rows, **_):
    lines = Path(__file__).with_name(rows).read_text().splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}


def likelihood(doc, results):
    return {"likelihood": results[0] if isinstance(results[0], float) else results[0][0]}


def spelled(doc, results):
    return {"spelled": float(sum(place * ord(letter) for place, letter in enumerate(results[0], 1)))}
"""


def write(folder: Path, name: str, kind: str, rows: list[dict[str, Any]], *settings: str, metric: str = "acc") -> None:
    """Write a task of lm-eval's into a folder."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [
        f"task: {name}\noutput_type: {kind}",
        f"custom_dataset: !function mine.load\ndataset_kwargs: {{rows: {name}.jsonl}}",
        'test_split: test\ndoc_to_text: "{{context}}"',
        f"metric_list:\n  - {{metric: {metric}, aggregation: mean, higher_is_better: true}}",
        *(["doc_to_choice: choices\ndoc_to_target: answer"] if kind == "multiple_choice" else []),
        *settings,
    ]
    (folder / f"{name}.yaml").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of every kind, with contexts of many lengths."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "mine.py").write_text(LOADER)
    starts = [" ".join(STORY.split()[: 1 + 2 * n]) for n in range(7)]
    endings = ["walked", "went home to her mother and slept", "saw a dog", "sat"]
    free = ("doc_to_target: '{{answer}}'", "process_results: !function mine.likelihood")
    plain = 'target_delimiter: ""'
    several = [{"context": one, "choices": endings, "answer": n % 4} for n, one in enumerate(starts)]
    write(folder, "letters", "multiple_choice", [{**row, "choices": list("tsam")} for row in several])
    write(folder, "words", "multiple_choice", several, metric="acc_norm")
    write(folder, "mutual", "multiple_choice", several[:3], metric="acc_mutual_info")
    nothing = {"context": "", "choices": [*endings, "<s>Then she", "<|endoftext|>Then she"], "answer": 0}
    write(folder, "empty", "multiple_choice", [nothing], plain)
    long = [{**row, "context": STORY * (30 + n)} for n, row in enumerate(several[:3])]
    write(folder, "long", "multiple_choice", long)
    uneven = [
        {"context": (STORY * 2)[:130].strip(), "choices": ["sat", endings[1]], "answer": 0},
        {"context": "Once", "choices": ["upon", STORY[5:60].strip()], "answer": 0},
    ]
    write(folder, "uneven", "multiple_choice", uneven)
    spoken = [{"context": one, "answer": endings[n % 4]} for n, one in enumerate(starts)]
    write(folder, "open", "loglikelihood", spoken, *free, metric="likelihood")
    write(folder, "rolling", "loglikelihood_rolling", spoken[:3], *free, metric="likelihood")
    write(
        folder,
        "told",
        "generate_until",
        spoken[:4],
        "doc_to_target: '{{answer}}'\nprocess_results: !function mine.spelled\nrepeats: 2",
        "generation_kwargs: {max_gen_toks: 12, until: ['.'], do_sample: false}",
        "filter_list:\n  - name: lower",
        "    filter: [{function: take_first_k, k: 2}, {function: lowercase}, {function: take_first}]",
        "  - {name: upper, filter: [{function: uppercase}, {function: take_first}]}",
        metric="spelled",
    )
    shots = "num_fewshot: 2\nfewshot_split: test"
    write(folder, "shots", "multiple_choice", several, shots)
    swallowed = {"context": "Once upon a time there wa", "choices": ["s", "n"], "answer": 0}
    write(folder, "mute", "multiple_choice", [swallowed], plain)
    return folder


Load = Callable[..., Split]


@pytest.fixture
def load(folder: Path) -> Load:
    """Load tasks, all of their items."""
    return lambda *names: load_split(list(names), "proxy", include=str(folder), proxy=1.0)


def live_model(name: str) -> tuple[Any, Any]:
    """A model and a tokenizer of the quickstart zoo."""
    model = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(MODELS / name)


def answers(scorer: LiveScorer) -> list[tuple[float, bool]]:
    """What the last call found for every request."""
    return [request.resps[0] for items in scorer._requests.values() for own in items.values() for request in own]


def lm_eval_model(model: Any, tokenizer: Any, batch_size: int = 4) -> HFLM:
    """lm-eval's own transformers model."""
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def agrees(scorer: LiveScorer, model: Any, tokenizer: Any, batch_size: int = 4) -> None:
    """Check every log-likelihood of the scorer's last call against lm-eval's."""
    requests = [request for items in scorer._requests.values() for own in items.values() for request in own]
    theirs = lm_eval_model(model, tokenizer, batch_size).loglikelihood(requests, disable_tqdm=True)
    assert len(theirs) > 0
    for ours, (likelihood, greedy) in zip(answers(scorer), theirs, strict=True):
        assert ours[0] == pytest.approx(likelihood, abs=1e-4)
        assert ours[1] is greedy


class Fed:
    """Counts what a model is given to read, and for how many tokens it predicts the next."""

    def __init__(self, model: Any) -> None:
        self.shapes: list[tuple[int, int]] = []
        self.predicted = 0
        model.register_forward_hook(self._note)

    def _note(self, _: Any, arguments: tuple[torch.Tensor], output: Any) -> None:
        self.shapes.append((arguments[0].shape[0], arguments[0].shape[1]))
        self.predicted += output.logits.shape[0] * output.logits.shape[1]

    @property
    def tokens(self) -> int:
        return sum(rows * width for rows, width in self.shapes)


@pytest.mark.parametrize("name", ["stories-math", "script-code"])
def test_scores_are_those_of_lm_eval(quick: dict[str, Checkpoint], name: str, load: Load) -> None:
    split = load(*LIKELIHOODS, "rolling", "told")
    reference = load_model(quick[name], 4)
    scorer = LiveScorer(*live_model(name), split, batch_size=4)
    assert scorer._lm.shares
    ours, theirs = scorer.score("it"), run_tasks(reference, split, "it")
    assert [task.task for task in ours.tasks] == [*LIKELIHOODS, "rolling", "told"]
    for mine, other in zip(ours.tasks, theirs.tasks, strict=True):
        assert list(mine.items) == list(other.items)
        if mine.metric != "likelihood":
            assert mine == other
        assert list(mine.items.values()) == pytest.approx(list(other.items.values()), abs=1e-4)
    assert len(set(ours.task("told").items.values())) > 1, "the generated texts should differ"
    assert scorer.score("it") == ours, "what lm-eval leaves on the tasks does not matter"


@pytest.mark.parametrize(("name", "starts"), [("stories-math", False), ("stories-math", True), ("script-code", False)])
def test_every_log_likelihood_is_lm_evals(name: str, starts: bool, load: Load) -> None:
    model, tokenizer = live_model(name)
    if starts:  # a tokenizer that puts a token before every text
        first = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[first])
        assert tokenizer.encode("Once")[0] == tokenizer.bos_token_id
    scorer = LiveScorer(model, tokenizer, load(*LIKELIHOODS), batch_size=4)
    lengths = {
        task: {len(scorer._pairs[id(request)][1]) for own in items.values() for request in own}
        for task, items in scorer._requests.items()
    }
    assert lengths["letters"] == {1}
    assert len(lengths["words"]) > 2
    assert any(len(context) > model.config.max_position_embeddings for context, _ in scorer._pairs.values())
    scorer.score("it")
    agrees(scorer, model, tokenizer)


def test_greedy_means_every_token() -> None:
    model, tokenizer = live_model("stories-math")
    lm = LiveScorer(model, tokenizer, Split(name="proxy", tasks=()))._lm
    context = tokenizer.encode(STORY)

    def on(*tokens: int) -> list[int]:
        """Let the model write three more tokens after the context and some others."""
        read = torch.tensor([[*context, *tokens]])
        return [*tokens, *model.generate(read, max_new_tokens=3, do_sample=False)[0, read.shape[1] :].tolist()]

    greedy, other = on(), on(7)
    tried = [greedy, greedy[:1], greedy[:2], other, [*greedy[:2], 7], [greedy[0], 7, greedy[2]], [7]]
    with torch.inference_mode():
        answers = lm.answers([(tuple(context), tuple(one)) for one in tried])
    assert [answer[1] for answer in answers] == [True, True, True, False, False, False, False]
    theirs = lm_eval_model(model, tokenizer)._loglikelihood_tokens([(None, context, one) for one in tried])
    for ours, (likelihood, is_greedy) in zip(answers, theirs, strict=True):
        assert ours == (pytest.approx(likelihood, abs=1e-4), is_greedy)


def test_a_tokenizer_may_be_of_any_kind(load: Load) -> None:
    model, tokenizer = live_model("stories-math")

    class Foreign:  # as Mistral's, which derives from none that lm-eval takes
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

    split = load("words")
    expected = LiveScorer(model, tokenizer, split).score("it")
    assert LiveScorer(model, Foreign(), split).score("it") == expected


def test_quickstart_items_score_the_same(quick: dict[str, Checkpoint]) -> None:
    split = load_split(["quick_math", "quick_code"], "proxy", include=str(QUICKSTART / "tasks"), limit=24)
    scorer = LiveScorer(*live_model("stories-math"), split)
    assert scorer.score("it") == run_tasks(load_model(quick["stories-math"], 16), split, "it")


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 1024}
LLAMA = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 96}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("kind", "settings", "shares"),
    [
        ("GPT2", {**SMALL, "n_positions": 64}, True),  # knows no position beyond its last
        ("GPTNeoX", {**SMALL, "max_position_embeddings": 96}, True),
        ("Mistral", {**LLAMA, "sliding_window": 8}, False),
        ("Gemma2", {**LLAMA, "head_dim": 8, "sliding_window": 8}, False),
        ("GPTNeo", {**SMALL, "num_heads": 4, "window_size": 8, "attention_types": [[["global", "local"], 1]]}, False),
        ("Bloom", {**SMALL, "n_layer": 2, "n_head": 4}, False),
        ("Mamba", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 1024}, False),
        ("Llama", {**LLAMA, "rope_parameters": {**LONG, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}}, False),
    ],
)
def test_other_architectures_agree_too(kind: str, settings: dict[str, Any], shares: bool, load: Load) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "script")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**settings)).eval()
    for parameter in model.parameters():
        parameter.data *= 3  # else everything is about as likely as everything else
    # Where rotations depend on the length of a text, lm-eval too scores it otherwise beside a longer one.
    size = 1 if "rope_parameters" in settings else 16
    scorer = LiveScorer(model, tokenizer, load(*LIKELIHOODS), batch_size=size)
    assert scorer._lm.shares is shares
    model.train()  # as a search might leave it
    scorer.score("it")
    agrees(scorer, model, tokenizer, size)


def test_a_model_that_cannot_choose_positions_is_read_in_full(load: Load) -> None:
    model, tokenizer = live_model("script-code")
    forward = model.forward
    model.forward = lambda input_ids: forward(input_ids)
    scorer = LiveScorer(model, tokenizer, load(*LIKELIHOODS), batch_size=4)
    assert not scorer._lm.shares
    assert not scorer._lm.chooses
    scorer.score("it")
    agrees(scorer, model, tokenizer)


@pytest.mark.parametrize(("batch_size", "tokens"), [(1, 2048), (3, 2048), (64, 2048), (16, 40)])
def test_batches_do_not_change_scores(
    batch_size: int, tokens: int, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = live_model("stories-math")
    split = load(*LIKELIHOODS)
    usual = LiveScorer(model, tokenizer, split, batch_size=7)
    expected = usual.score("it")
    monkeypatch.setattr(live, "TOKENS", tokens)
    fed = Fed(model)
    scorer = LiveScorer(model, tokenizer, split, batch_size=batch_size)
    got = scorer.score("it")
    assert max(rows for rows, _ in fed.shapes) <= batch_size
    assert all(rows == 1 or rows * width <= tokens for rows, width in fed.shapes)
    assert [likelihood for likelihood, _ in answers(scorer)] == pytest.approx(
        [likelihood for likelihood, _ in answers(usual)], abs=1e-4
    )
    for mine, other in zip(got.tasks, expected.tasks, strict=True):
        assert mine.items == (pytest.approx(other.items, abs=1e-4) if mine.metric == "likelihood" else other.items)


def test_nothing_is_read_twice_and_only_what_was_asked_for(load: Load) -> None:
    model, tokenizer = live_model("script-code")
    split = load("letters", "words", "open")
    scorer = LiveScorer(model, tokenizer, split, batch_size=1)
    fed = Fed(model)

    def least(hashes: dict[str, list[str]]) -> tuple[int, int]:
        pairs = [
            scorer._pairs[id(request)]
            for task, items in hashes.items()
            for item in items
            for request in scorer._requests[task][item]
        ]
        contexts = {context for context, _ in pairs}
        more = sum(len(continuation) - 1 for _, continuation in pairs)
        return sum(len(context) for context in contexts) + more, len(contexts) + more

    everything = scorer.score("it")
    assert (fed.tokens, fed.predicted) == least({items.name: list(items.hashes) for items in split.tasks})
    only = {"words": list(split.tasks[1].hashes[2:4]), "open": list(split.tasks[2].hashes[:1]), "letters": []}
    fed.shapes, fed.predicted = [], 0
    some = scorer.score("it", only)
    assert (fed.tokens, fed.predicted) == least(only)
    assert [task.task for task in some.tasks] == ["words", "open"], "a task without items is left out"
    for task in some.tasks:
        assert list(task.items) == only[task.task]
        assert task.items == pytest.approx({item: everything.task(task.task).items[item] for item in task.items})
    assert scorer.score("it", {}).tasks == ()
    assert scorer.score("it") == everything


def test_changed_weights_change_scores(quick: dict[str, Checkpoint], load: Load) -> None:
    split = load("letters", "words", "open")
    model, tokenizer = live_model("stories-math")
    other, _ = live_model("stories-law")
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scorer = LiveScorer(model, tokenizer, split)
    first = scorer.score("it")
    model.load_state_dict(other.state_dict())
    second = scorer.score("it")
    assert second.task("open") != first.task("open")
    agrees(scorer, other, tokenizer)
    theirs = run_tasks(load_model(quick["stories-law"], 16), split, "it")
    assert second.task("open").items == pytest.approx(theirs.task("open").items, abs=1e-4)
    assert second.task("words") == theirs.task("words")
    model.load_state_dict(own)
    assert scorer.score("it") == first


def test_two_scorers_share_the_tasks_of_a_split(load: Load) -> None:
    split = load("words", "told")
    first, second = (LiveScorer(*live_model(name), split) for name in ("stories-math", "script-code"))
    before = first.score("it")
    assert second.score("it").tasks != before.tasks
    assert first.score("it") == before


@pytest.mark.parametrize("name", ["words", "rolling"])
def test_a_broken_model_is_named(name: str, load: Load) -> None:
    model, tokenizer = live_model("stories-math")
    scorer = LiveScorer(model, tokenizer, load(name))
    sound = scorer.score("it")
    weight = model.model.layers[2].mlp.down_proj.weight
    kept = weight.detach().clone()
    weight.data[0, 0] = float("nan")
    with pytest.raises(EvaluationError, match=r"^the merge: its log-likelihoods are not finite$"):
        scorer.score("the merge")
    weight.data.copy_(kept)
    assert scorer.score("it") == sound


def test_examples_are_the_same_for_every_model(quick: dict[str, Checkpoint], load: Load) -> None:
    split = load("shots")
    first, second = (LiveScorer(*live_model("stories-math"), split) for _ in range(2))
    assert list(first._pairs.values()) == list(second._pairs.values())
    split.tasks[0].task.set_fewshot_seed(FEWSHOT_SEED)
    assert first.score("it") == run_tasks(load_model(quick["stories-math"], 16), split, "it")


def test_what_cannot_be_scored_is_refused(load: Load) -> None:
    model, tokenizer = live_model("stories-math")
    with pytest.raises(EvaluationError, match="task 'mute': 's', 0 tokens after 7, cannot be scored"):
        LiveScorer(model, tokenizer, load("mute"))
    for reason in ("UNSAFE_CODE", "MULTIMODAL"):
        split = load("words")
        setattr(split.tasks[0].task, reason, True)
        with pytest.raises(EvaluationError, match="task 'words' needs more than text, or runs generated code in no"):
            LiveScorer(model, tokenizer, split)


def test_what_is_longer_than_a_model_reads_is_as_good_as_impossible_to_it(load: Load) -> None:
    """lm-eval's own model stops there, so a zoo could hold no model that reads less than a task's longest answer."""
    model, tokenizer = live_model("stories-math")
    scorer = LiveScorer(model, tokenizer, load("words"))
    longest = scorer._lm.max_length
    short, whole, long = ((1,), (5, 6)), ((1,), (5,) * longest), ((1,), (5,) * (longest + 1))
    first, impossible, last, again = scorer._lm.answers([short, long, whole, short])
    assert impossible == (-1e4, False)
    assert first == again
    assert last[0] > -1e4


def test_there_are_no_progress_bars(folder: Path) -> None:
    code = f"""
from tests.test_live_scoring import LiveScorer, live_model, load_split
split = load_split(["words", "rolling", "told"], "proxy", include={str(folder)!r}, proxy=1.0)
print(len(LiveScorer(*live_model("stories-math"), split).score("it").tasks))
import tqdm, sys
tqdm.tqdm(range(1), file=sys.stdout).update()
"""
    environment = {**os.environ, "TQDM_DISABLE": "", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.startswith("3\n"), done.stderr
    assert "%|" in done.stdout, "bars are on, so their absence says something"
    assert "%|" not in done.stderr
    assert "it/s" not in done.stderr
