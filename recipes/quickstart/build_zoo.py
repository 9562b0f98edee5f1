"""Build the quickstart zoo: nine tiny language models in two families, and six local lm-eval tasks.

    python recipes/quickstart/build_zoo.py --data DIR --base DIR --out recipes/quickstart

``--data`` is a folder with the JSON-lines files named in ``README.md`` beside this script, ``--base`` a
copy of the ``stories260k`` checkpoint. Everything is seeded and runs on one CPU core in under 20 minutes.

Family A are fine-tunes of stories260k (Llama, 512-entry tokenizer). Family B (Qwen2, byte-level BPE) is
trained from scratch here. Each source passage belongs to one split, decided by a hash of the passage:
``train`` (the only text a model ever sees), ``proxy`` (``validation``) or ``heldout`` (``test``).
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib.util
import itertools
import json
import math
import random
import re
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

DOMAINS = ("math", "science", "law", "web", "code", "play")
SPLITS = ("train", "proxy", "heldout")
SHARES = {"train": 0.64, "proxy": 0.14}  # the rest is held out
ITEMS = {"train": 64, "proxy": 96, "heldout": 200}  # most items per task and split
DELIMITER = {"math": "\n", "code": "\n"}  # between context and choice; one blank elsewhere
TITLES = {
    "math": "grade-school word problems: how does the solution begin?",
    "science": "science questions: how do question and answer end?",
    "law": "legal fact patterns: how does the passage go on?",
    "web": "web pages: how does the passage go on?",
    "code": "Python functions: which line comes next?",
    "play": "Shakespeare: how does the passage go on?",
}
SCIENCE = {  # subjects of MMLU
    "anatomy",
    "astronomy",
    "clinical_knowledge",
    "college_biology",
    "college_medicine",
    "conceptual_physics",
    "electrical_engineering",
    "high_school_biology",
    "high_school_chemistry",
    "high_school_geography",
    "high_school_physics",
    "high_school_psychology",
    "human_aging",
    "human_sexuality",
    "medical_genetics",
    "nutrition",
    "prehistory",
    "professional_psychology",
    "sociology",
    "virology",
}
SHINGLE = 12  # an evaluation item shares no run of this many words with any training passage
HEAD_DIM = 32  # the smallest one that vLLM's CPU attention accepts
PLAIN_CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
END_B = "<|endoftext|>"
CARD = "---\nlicense: {licence}\n---\n\n# {name}\n\nOne of the quickstart zoo; see its README and LICENSES.\n"


@dataclass(frozen=True)
class Passage:
    """One source passage; ``key`` is hashed to pick its split, ``trainable`` false keeps it from training."""

    domain: str
    source: str
    key: str
    text: str
    trainable: bool = True
    cut: int | None = None  # where the continuation begins, when the source says so

    @property
    def split(self) -> str:
        """The split that this passage belongs to."""
        return split_of(self.key)


@dataclass(frozen=True)
class Recipe:
    """How one model is trained: the shares of the domains, and the optimiser's settings."""

    mix: dict[str, float]
    steps: int
    lr: float
    seed: int
    floor: float = 0.05  # the last step's learning rate, as a share of the peak
    scramble: bool = False
    min_cosine: float = 0.0  # stop as soon as the cosine to the starting point falls this low


def focus(domain: str, others: Sequence[str], share: float) -> dict[str, float]:
    """``share`` of the text from ``domain``, the rest evenly from ``others``."""
    rest = [other for other in others if other != domain]
    return {domain: share} | {other: (1 - share) / len(rest) for other in rest}


A_DOMAINS = ("math", "science", "law", "web")
FAMILY_A = {
    "stories-math": Recipe(focus("math", A_DOMAINS, 0.6), steps=280, lr=3e-3, seed=11),
    "stories-science": Recipe(focus("science", A_DOMAINS, 0.6), steps=280, lr=3e-3, seed=12),
    "stories-law": Recipe(focus("law", A_DOMAINS, 0.6), steps=280, lr=3e-3, seed=13),
    "stories-web": Recipe(focus("web", A_DOMAINS, 0.6), steps=280, lr=3e-3, seed=14),
    "stories-scrambled": Recipe(
        focus("web", A_DOMAINS, 0.25), steps=400, lr=6e-3, seed=15, scramble=True, min_cosine=0.989
    ),
}
TRUNK_B = Recipe(
    {"code": 0.46, "play": 0.46, "web": 0.02, "math": 0.02, "law": 0.02, "science": 0.02},
    steps=1000,
    lr=3e-3,
    seed=21,
    floor=0.6,
)
FAMILY_B = {
    "script-code": Recipe(focus("code", ("code", "play"), 0.7), steps=350, lr=1.8e-3, seed=22),
    "script-play": Recipe(focus("play", ("code", "play"), 0.7), steps=350, lr=1.8e-3, seed=23),
}


# ---------------------------------------------------------------- passages and their splits

Passages = dict[str, dict[str, list[Passage]]]  # [domain][split]
Items = dict[str, dict[str, list[dict]]]  # [domain][split]


def split_of(key: str) -> str:
    """Train, proxy or heldout, from the SHA-256 of the source passage's key."""
    point = int(hashlib.sha256(key.encode()).hexdigest()[:12], 16) / 16**12
    if point < SHARES["train"]:
        return "train"
    return "proxy" if point < SHARES["train"] + SHARES["proxy"] else "heldout"


def read_rows(path: Path) -> list[dict]:
    """Return the rows of one JSON-lines file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def tidy(text: str) -> str:
    """Plain ASCII punctuation and single blanks; line breaks stay."""
    text = text.translate({0xD2: '"', 0xD3: '"', 0xD5: "'"})  # Mac quotation marks, read as Latin-1
    table = {
        "\u2019": "'",
        "\u2018": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2014": "-",
        "\u2026": "...",
        "\r": "",
        "\t": "    ",
    }
    for old, new in table.items():
        text = text.replace(old, new)
    return "\n".join(line.rstrip() for line in text.split("\n")).strip()


def math_passages(data: Path) -> Iterable[Passage]:
    """GSM8K: a question and its worked solution without the calculator marks."""
    for number, row in enumerate(read_rows(data / "gsm8k_train.jsonl")):
        question = " ".join(tidy(row["question"]).split())
        answer = re.sub(r"<<.*?>>", "", tidy(row["answer"]))
        answer = answer.replace("####", "The answer is")
        text = f"{question}\n{answer}"
        yield Passage("math", f"gsm8k_train/{number}", question, text, cut=len(question))


def science_passages(data: Path) -> Iterable[Passage]:
    """Yield the questions of MMLU's science subjects, each followed by its right answer."""
    for number, row in enumerate(read_rows(data / "mmlu_test.jsonl")):
        question = " ".join(tidy(row["question"]).split())
        answer = " ".join(tidy(str(row["choices"][row["answer"]])).split())
        if row["subject"] in SCIENCE and len(question) < 500 and "_" not in question:
            yield Passage("science", f"mmlu_test/{number}", question.lower(), f"{question} {answer}")


def law_passages(data: Path) -> Iterable[Passage]:
    """Yield the fact patterns of MMLU's law subjects; questions on the same facts share one key."""
    for number, row in enumerate(read_rows(data / "mmlu_test.jsonl")):
        if row["subject"] in ("professional_law", "jurisprudence", "international_law"):
            text = " ".join(tidy(row["question"]).split())
            yield Passage("law", f"mmlu_test/{number}", text[:60].lower(), text)


def web_passages(data: Path) -> Iterable[Passage]:
    """C4 pages in pieces of about 320 characters; a page's pieces share its key."""
    for number, row in enumerate(read_rows(data / "c4_demo.jsonl")):
        page = tidy(row["text"])
        words = page.replace("\n", " ").split()
        piece: list[str] = []
        for word in words:
            piece.append(word)
            if sum(map(len, piece)) + len(piece) > 320:
                yield Passage("web", f"c4_demo/{number}", page, " ".join(piece))
                piece = []


def play_passages(data: Path) -> Iterable[Passage]:
    """Tiny Shakespeare: consecutive speeches, joined until they hold 400 characters."""
    scene: list[str] = []
    start = 0
    for number, row in enumerate(read_rows(data / "tinyshakespeare.jsonl")):
        if not scene:
            start = number
        scene.append(tidy(row["text"]))
        if sum(map(len, scene)) > 400:
            text = "\n\n".join(scene)
            yield Passage("play", f"tinyshakespeare/{start}", text, text)
            scene = []


def code_passages(data: Path) -> Iterable[Passage]:
    """MBPP and HumanEval functions under their description, and NetworkX's functions (training only).

    MBPP's test ids (11-510) and HumanEval are benchmarks, so they never serve for training.
    """
    for row in read_rows(data / "mbpp.jsonl"):
        text = tidy(row["text"]) + "\n" + tidy(row["code"])
        yield Passage("code", f"mbpp/{row['task_id']}", text, text, trainable=not 11 <= row["task_id"] <= 510)
    for row in read_rows(data / "humaneval.jsonl"):
        text = tidy(row["prompt"] + row["canonical_solution"])
        yield Passage("code", row["task_id"], text, text, trainable=False)
    spec = importlib.util.find_spec("networkx")
    if spec is None or spec.origin is None:
        raise SystemExit("the networkx package (BSD-3-Clause; PyTorch brings it) is needed as training text")
    root = Path(spec.origin).parent
    for path in sorted(root.rglob("*.py")):
        if "tests" in path.parts:
            continue
        for part in re.split(r"\n(?=def |class |@)", path.read_text(encoding="utf-8")):
            code = re.sub(r'("""|\'\'\').*?\1', "", part, flags=re.S)
            code = re.sub(r"\n\s*\n+", "\n", tidy(code))
            if 120 < len(code) < 4000 and "def " in code and split_of(code) == "train":
                yield Passage("code", f"networkx/{path.relative_to(root).as_posix()}", code, code)


def collect(data: Path) -> Passages:
    """All passages as ``[domain][split]``, each domain's in one reproducible order."""
    readers: dict[str, Callable[[Path], Iterable[Passage]]] = {
        "math": math_passages,
        "science": science_passages,
        "law": law_passages,
        "web": web_passages,
        "code": code_passages,
        "play": play_passages,
    }
    passages: Passages = {}
    for domain in DOMAINS:
        passages[domain] = {split: [] for split in SPLITS}
        for passage in readers[domain](data):
            if passage.split != "train" or passage.trainable:
                passages[domain][passage.split].append(passage)
    return passages


# ---------------------------------------------------------------- multiple-choice tasks


@dataclass
class Draft:
    """One item before its distractors are drawn."""

    passage: Passage
    context: str
    continuation: str


def word_end(text: str, position: int) -> int:
    """Find the nearest blank at or after ``position`` (or the end)."""
    found = text.find(" ", position)
    return len(text) if found < 0 else found


def draft_question(passage: Passage) -> Draft | None:
    """Cut math before the first line of the solution, science before its last words."""
    text, cut = passage.text, passage.cut or 0
    if passage.domain == "science":
        cut = text.rfind(" ", 0, max(30, len(text) - 42))
    context, rest = text[:cut].strip(), text[cut:].strip().split("\n")[0]
    while len(context) > 90 and ". " in context[:-30]:
        context = context.split(". ", 1)[1]
    continuation = rest[: word_end(rest, 44)].strip()
    if not 25 < len(context) < 130 or len(continuation) < 25:
        return None
    return Draft(passage, context, continuation)


def draft_prose(passage: Passage, rng: random.Random) -> Draft | None:
    """Cut a context of about 75 characters and the 42 to 60 characters that follow."""
    text = passage.text
    if len(text) < 160:
        return None
    room = max(0, min(len(text) - 160, 400))
    start = 0 if passage.domain == "play" else word_end(text, rng.randint(0, room))
    begin = text[start:].strip()
    cut = word_end(begin, 75)
    continuation = begin[cut : word_end(begin, cut + 42)].strip()
    if cut > 110 or not 36 < len(continuation) < 75 or "\n\n" in continuation:
        return None
    return Draft(passage, begin[:cut].strip(), continuation)


def draft_code(passage: Passage) -> Draft | None:
    """Cut at the end of a line: a context of up to 180 characters, then the next one or two lines."""
    lines = [line for line in passage.text.split("\n") if line.strip()]
    for number in range(len(lines) - 1, 1, -1):
        context = "\n".join(lines[:number])
        continuation = lines[number]
        for line in lines[number + 1 :]:
            if len(continuation) >= 25:
                break
            continuation += "\n" + line
        if 50 <= len(context) <= 180 and 20 <= len(continuation) <= 75:
            return Draft(passage, context, continuation)
    return None


def draft_of(passage: Passage, rng: random.Random) -> Draft | None:
    """Make the item that a passage gives, if it gives one."""
    if passage.domain in ("math", "science"):
        return draft_question(passage)
    return draft_code(passage) if passage.domain == "code" else draft_prose(passage, rng)


def shingles(text: str) -> set[tuple[str, ...]]:
    """All runs of ``SHINGLE`` words of a text."""
    words = text.lower().split()
    return {tuple(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}


def swaps(text: str) -> list[str]:
    """Return the text with one pair of neighbouring words exchanged, for every pair but numbers."""
    words = list(re.finditer(r"[\w']+", text))
    found = []
    for one, two in itertools.pairwise(words):
        if one[0].lower() == two[0].lower() or (one[0].isdigit() and two[0].isdigit()):
            continue
        middle = text[one.end() : two.start()]
        found.append(text[: one.start()] + two[0] + middle + one[0] + text[two.end() :])
    return sorted(set(found))


def make_items(drafts: list[Draft], count: int) -> list[dict]:
    """Hide the true continuation among three in which two neighbouring words have changed places."""
    items = []
    drafts = [draft for draft in drafts if len(swaps(draft.continuation)) >= 3]
    chosen = sorted(drafts, key=lambda d: hashlib.sha256(("pick" + d.context).encode()).hexdigest())[:count]
    for draft in chosen:
        rng = random.Random(draft.context)
        choices = [draft.continuation, *rng.sample(swaps(draft.continuation), 3)]
        rng.shuffle(choices)
        items.append(
            {
                "context": draft.context,
                "choices": choices,
                "answer": choices.index(draft.continuation),
                "source": draft.passage.source,
            }
        )
    return items


def build_items(passages: Passages) -> Items:
    """Return the items as ``[domain][split]``; evaluation passages that repeat training text are left out."""
    seen: set[tuple[str, ...]] = set()
    for domain in DOMAINS:
        for passage in passages[domain]["train"]:
            seen |= shingles(passage.text)
    proxy_seen: set[tuple[str, ...]] = set()
    items: Items = {}
    for domain in DOMAINS:
        items[domain] = {}
        contexts: set[str] = set()
        for split in SPLITS:
            rng = random.Random(f"{domain}/{split}")
            drafts = []
            for passage in passages[domain][split]:
                found = draft_of(passage, rng)
                if split != "train":
                    runs = shingles(passage.text)
                    if not (runs.isdisjoint(seen) and runs.isdisjoint(proxy_seen)):
                        continue
                if found and found.context not in contexts and not passage.source.startswith("networkx"):
                    contexts.add(found.context)
                    drafts.append(found)
            if split == "proxy":
                for found in drafts:
                    proxy_seen |= shingles(found.passage.text)
            items[domain][split] = make_items(drafts, ITEMS[split])
    return items


def check_splits(passages: Passages, items: Items) -> None:
    """Stop unless the splits are disjoint in passages, contexts, choices and long runs of words."""
    for domain in DOMAINS:
        keys = {split: {p.key for p in passages[domain][split]} for split in SPLITS}
        texts = {split: {p.text for p in passages[domain][split]} for split in SPLITS}
        trained = set().union(*(shingles(p.text) for p in passages[domain]["train"]))
        runs = {}
        for split in SPLITS:
            rows = items[domain][split]
            assert all(len(set(row["choices"])) == 4 for row in rows), f"{domain}: a choice comes twice"
            runs[split] = set().union(*(shingles(row["context"] + " " + row["choices"][row["answer"]]) for row in rows))
        for one, two in (("train", "proxy"), ("train", "heldout"), ("proxy", "heldout")):
            assert not keys[one] & keys[two], f"{domain}: {one} and {two} share a passage"
            assert not texts[one] & texts[two], f"{domain}: {one} and {two} share a text"
            assert not runs[one] & runs[two], f"{domain}: {one} and {two} share a run of words"
            shared = {r["context"] for r in items[domain][one]} & {r["context"] for r in items[domain][two]}
            assert not shared, f"{domain}: {one} and {two} share a context"
        for split in ("proxy", "heldout"):
            assert not runs[split] & trained, f"{domain}: {split} repeats training text"


LOADER = '''"""Read a quickstart task's JSON lines, which lie beside this file, wherever lm-eval is started."""

import json
from pathlib import Path

import datasets


def load(domain: str, **_: object) -> dict[str, datasets.Dataset]:
    """Return the three splits of one task, as lm-eval's ``custom_dataset`` wants them."""
    folder = Path(__file__).resolve().parent / "data"
    splits = {}
    for name, part in (("train", "train"), ("validation", "proxy"), ("test", "heldout")):
        with (folder / f"{domain}_{part}.jsonl").open(encoding="utf-8") as lines:
            splits[name] = datasets.Dataset.from_list([json.loads(line) for line in lines])
    return splits
'''

TASK = """# {title} (made by build_zoo.py)
task: quick_{domain}
tag: quick
dataset_path: ""
custom_dataset: !function quick_loader.load
dataset_kwargs:
  domain: {domain}
training_split: train
validation_split: validation
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: {delimiter}
num_fewshot: 0
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def write_tasks(items: Items, folder: Path) -> None:
    """Write the task files, their loader and their data."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "data").mkdir(parents=True)
    (folder / "quick_loader.py").write_text(LOADER, encoding="utf-8")
    for domain in DOMAINS:
        delimiter = json.dumps(DELIMITER.get(domain, " "))
        text = TASK.format(title=TITLES[domain], domain=domain, delimiter=delimiter)
        (folder / f"quick_{domain}.yaml").write_text(text, encoding="utf-8")
        for split in SPLITS:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in items[domain][split]]
            (folder / "data" / f"{domain}_{split}.jsonl").write_text("".join(lines), encoding="utf-8")


# ---------------------------------------------------------------- training


def encode_passages(tokenizer: PreTrainedTokenizerFast, texts: list[str], end: int) -> torch.Tensor:
    """One long row of token ids, each text between ``end`` marks."""
    ids: list[int] = []
    for row in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        ids += [end, *row]
    return torch.tensor(ids, dtype=torch.long)


def scrambled(texts: list[str], seed: int) -> list[str]:
    """Each text with its words in random order and each word's letters backwards."""
    rng = random.Random(seed)
    result = []
    for text in texts:
        words = text.split()
        rng.shuffle(words)
        result.append(" ".join(word[::-1] for word in words))
    return result


def flat_cosine(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """Cosine of all weights as one vector."""
    dot = sum(float((one[k].double() * two[k].double()).sum()) for k in one)
    size = [sum(float(w[k].double().square().sum()) for k in one) for w in (one, two)]
    return dot / math.sqrt(size[0] * size[1])


def train(
    model: PreTrainedModel,
    streams: dict[str, torch.Tensor],
    recipe: Recipe,
    bos: int | None,
    batch: int = 16,
    length: int = 192,
) -> None:
    """Next-token training on random windows; every other window begins with the BOS token, if there is one."""
    generator = torch.Generator().manual_seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    names = sorted(recipe.mix)
    shares = torch.tensor([recipe.mix[name] for name in names])
    start = {k: v.clone() for k, v in model.state_dict().items()} if recipe.min_cosine else {}
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))
    model.train()
    for step in range(recipe.steps):
        warm = min(1.0, (step + 1) / (0.05 * recipe.steps))
        fall = recipe.floor + (1 - recipe.floor) * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        for group in optimiser.param_groups:
            group["lr"] = recipe.lr * warm * fall
        rows = []
        for number, pick in enumerate(torch.multinomial(shares, batch, True, generator=generator).tolist()):
            stream = streams[names[pick]]
            place = int(torch.randint(len(stream) - length - 1, (1,), generator=generator))
            row = stream[place : place + length + 1].clone()
            if bos is not None and number % 2 == 0:
                row[0] = bos
            rows.append(row)
        ids = torch.stack(rows)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 0 or step == recipe.steps - 1:
            print(f"    step {step:5d}  loss {loss.item():.3f}", flush=True)
        if recipe.min_cosine and flat_cosine(start, model.state_dict()) <= recipe.min_cosine:
            print(f"    stopped at step {step}: cosine {recipe.min_cosine}  loss {loss.item():.3f}", flush=True)
            break
    model.eval()


# ---------------------------------------------------------------- family A


def widen_heads(model: PreTrainedModel, head_dim: int = HEAD_DIM) -> PreTrainedModel:
    """Express the same function with wider attention heads.

    Each head's two rotary halves, and its values, are padded with zeros. The query is scaled so that the
    softmax temperature stays, and ``rope_theta`` raised to the power ``new / old`` keeps the frequencies.
    """
    config = copy.deepcopy(model.config)
    old = model.config.head_dim
    scale = head_dim / old
    config.head_dim = head_dim
    theta = float(model.config.rope_parameters["rope_theta"])
    config.rope_parameters = {"rope_type": "default", "rope_theta": theta**scale}

    def rows(weight: torch.Tensor, rotary: bool) -> torch.Tensor:
        heads = weight.shape[0] // old
        weight = weight.view(heads, old, -1)
        wide = torch.zeros(heads, head_dim, weight.shape[-1])
        half = old // 2
        if rotary:
            wide[:, :half] = weight[:, :half]
            wide[:, head_dim // 2 : head_dim // 2 + half] = weight[:, half:]
        else:
            wide[:, :old] = weight
        return wide.reshape(heads * head_dim, -1)

    weights = {}
    for name, weight in model.state_dict().items():
        if "q_proj" in name:
            weight = rows(weight, True) * math.sqrt(scale)
        elif "k_proj" in name:
            weight = rows(weight, True)
        elif "v_proj" in name:
            weight = rows(weight, False)
        elif "o_proj" in name:
            weight = rows(weight.T.contiguous(), False).T.contiguous()
        weights[name] = weight
    wide_model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    wide_model.load_state_dict(weights)
    return wide_model.eval()


def check_widening(narrow: PreTrainedModel, wide: PreTrainedModel) -> None:
    """Stop unless both models give the same logits."""
    ids = torch.randint(3, 500, (2, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        gap = (narrow(ids).logits - wide(ids).logits).abs().max().item()
    assert gap < 1e-3, f"widening the heads moved the logits by {gap}"


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, licence: str = "apache-2.0") -> None:
    """Write one Hugging Face directory in bfloat16, with a model card that states the licence."""
    shutil.rmtree(folder, ignore_errors=True)
    copy_model = copy.deepcopy(model).to(torch.bfloat16)
    copy_model.config.dtype = torch.bfloat16
    copy_model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
    )
    copy_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.pop("is_local", None)
    settings.pop("local_files_only", None)
    settings["model_max_length"] = model.config.max_position_embeddings
    settings["chat_template"] = PLAIN_CHAT
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "README.md").write_text(CARD.format(licence=licence, name=folder.name), encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)


def build_family_a(base: Path, passages: Passages, out: Path) -> None:
    """Write the base with wide heads, and its fine-tunes (trained with the narrow heads, then widened)."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    narrow = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wide = widen_heads(narrow)
    check_widening(narrow, wide)
    save(wide, tokenizer, out / "stories", licence="mit")
    texts = {d: [p.text for p in passages[d]["train"]] for d in A_DOMAINS}
    for name, recipe in FAMILY_A.items():
        print(f"  {name}", flush=True)
        streams = {
            domain: encode_passages(
                tokenizer, scrambled(rows, recipe.seed) if recipe.scramble else rows, tokenizer.bos_token_id
            )
            for domain, rows in texts.items()
        }
        model = copy.deepcopy(narrow)
        train(model, streams, recipe, tokenizer.bos_token_id)
        save(widen_heads(model), tokenizer, out / name)


# ---------------------------------------------------------------- family B


def make_tokenizer_b(texts: list[str], size: int = 1024) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with one special token."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_B],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=END_B, eos_token=END_B, pad_token=END_B)


def make_model_b(tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """Return a fresh Qwen2 model of about half a million weights."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.05,
    )
    return Qwen2ForCausalLM(config)


def build_family_b(passages: Passages, out: Path, work: Path | None = None) -> None:
    """Tokenizer and trunk from scratch, then the models continued from the trunk."""
    texts = {d: [p.text for p in passages[d]["train"]] for d in DOMAINS}
    sample = [text for d in ("code", "play") for text in texts[d]]
    sample += [text for d in A_DOMAINS for text in texts[d][:400]]
    tokenizer = make_tokenizer_b(sample)
    streams = {d: encode_passages(tokenizer, rows, tokenizer.eos_token_id) for d, rows in texts.items()}
    print("  tokens", {d: len(s) for d, s in streams.items()}, flush=True)
    trunk = make_model_b(tokenizer, TRUNK_B.seed)
    print(f"  trunk ({sum(p.numel() for p in trunk.parameters())} weights)", flush=True)
    train(trunk, streams, TRUNK_B, None)
    save(trunk, tokenizer, out / "script")
    for name, recipe in FAMILY_B.items():
        print(f"  {name}", flush=True)
        model = copy.deepcopy(trunk)
        train(model, streams, recipe, None)
        save(model, tokenizer, out / name)


# ---------------------------------------------------------------- examples and measurements


def write_examples(items: Items, path: Path, count: int = 8) -> None:
    """Write example requests for the router, per model: contexts of the tasks' training items."""
    domains = {"stories": A_DOMAINS, "stories-scrambled": A_DOMAINS, "script": ("code", "play")}
    for name in (*FAMILY_A, *FAMILY_B):
        domains.setdefault(name, (name.split("-")[1],))
    lines = ["# Example requests, per model (made by build_zoo.py from training passages only)."]
    for name, own in domains.items():
        lines.append(f"{name}:")
        for number in range(count):
            rows = items[own[number % len(own)]]["train"]
            lines.append("  - " + json.dumps(rows[number // len(own)]["context"], ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a model directory."""
    return load_file(folder / "model.safetensors")


def cosines(folders: dict[str, Path]) -> dict[str, tuple[float, float, float]]:
    """For each pair of models: cosine of all weights, and the mean and the least over the tensors."""
    weights = {name: weights_of(folder) for name, folder in folders.items()}
    found = {}
    for one, two in itertools.combinations(weights, 2):
        a, b = weights[one], weights[two]
        single = [flat_cosine({k: a[k]}, {k: b[k]}) for k in a]
        found[f"{one} / {two}"] = (flat_cosine(a, b), sum(single) / len(single), min(single))
    return found


def merge(folders: list[Path], out: Path) -> Path:
    """Write the plain average of some models, by mergekit's linear method."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    entries = [{"model": str(folder.resolve()), "parameters": {"weight": 1.0}} for folder in folders]
    config = {"merge_method": "linear", "models": entries, "dtype": "bfloat16"}
    shutil.rmtree(out, ignore_errors=True)
    run_merge(MergeConfiguration.model_validate(config), str(out), MergeOptions(copy_tokenizer=True, quiet=True))
    return out


class Judge:
    """Scores model directories with lm-eval; ``split`` is ``validation`` (proxy) or ``test`` (held-out)."""

    def __init__(self, tasks: Path) -> None:
        from lm_eval.tasks import TaskManager

        self.seconds = 0.0
        self.known: dict[tuple[Path, str], dict[str, float]] = {}
        self.manager = TaskManager(include_path=str(tasks), include_defaults=False)

    def __call__(self, folder: Path, split: str) -> dict[str, float]:
        """Accuracy per domain."""
        import lm_eval
        from lm_eval.tasks._yaml_loader import load_yaml

        if (folder, split) in self.known:
            return self.known[folder, split]
        began = time.monotonic()
        specs = []
        for domain in DOMAINS:
            spec = load_yaml(self.manager.task_index[f"quick_{domain}"].yaml_path)
            specs.append({**spec, "test_split": split})
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(folder), "dtype": "float32"},
            tasks=specs,
            task_manager=self.manager,
            batch_size=64,
            device="cpu",
            bootstrap_iters=0,
            log_samples=False,
        )
        self.seconds = time.monotonic() - began
        scores = {domain: found["results"][f"quick_{domain}"]["acc,none"] for domain in DOMAINS}
        self.known[folder, split] = scores
        return scores


def mean(scores: dict[str, float]) -> float:
    """Return the mean over the domains."""
    return sum(scores.values()) / len(scores)


def greedy(judge: Judge, folders: dict[str, Path], work: Path) -> tuple[list[str], list[str]]:
    """Average greedily on the proxy split: best first, a candidate stays if the score does not fall."""
    alone = {name: mean(judge(folder, "validation")) for name, folder in folders.items()}
    kept: list[str] = []
    best, log = 0.0, []
    for name in sorted(alone, key=lambda n: -alone[n]):
        trial = [folders[n] for n in (*kept, name)]
        score = mean(judge(merge(trial, work / "-".join((*kept, name))), "validation")) if kept else alone[name]
        log.append(f"{'keep' if score >= best else 'drop'} {name}: {alone[name]:.4f} alone, {score:.4f} merged")
        print(log[-1], flush=True)
        if score >= best:
            kept, best = [*kept, name], score
    return kept, log


def report(out: Path, work: Path) -> None:
    """Measure everything that README.md reports, into ``work/report.json``. Chooses nothing."""
    judge = Judge(out / "tasks")
    found: dict[str, object] = {}
    rows: dict[str, Path] = {}
    for family in (("stories", *FAMILY_A), ("script", *FAMILY_B)):
        folders = {name: out / "models" / name for name in family}
        rows |= folders
        found[f"cosines {family[0]}"] = cosines(folders)
        kept, found[f"greedy {family[0]}"] = greedy(judge, folders, work)
        rows[f"greedy average of {family[0]}"] = merge([folders[n] for n in kept], work / f"{family[0]}-greedy")
        if family[0] == "stories":
            good = [folders[n] for n in family if n not in ("stories", "stories-scrambled")]
            rows["average of the four fine-tunes"] = merge(good, work / "four")
            rows["the same and stories-scrambled"] = merge([*good, folders["stories-scrambled"]], work / "five")
    for split in ("validation", "test"):
        for name, folder in rows.items():
            scores = judge(folder, split)
            found[f"{name}, {split}"] = scores
            cells = " | ".join(f"{scores[d]:.3f}" for d in DOMAINS)
            print(f"| {split} | {name} | {cells} | {mean(scores):.3f} | {judge.seconds:.1f} s", flush=True)
    (work / "report.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


def main() -> None:
    """Make everything below ``--out``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the JSON-lines files")
    parser.add_argument("--base", type=Path, required=True, help="folder of the stories260k checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="where models/ and tasks/ go")
    parser.add_argument("--report", type=Path, metavar="WORK", help="measure what is there; build nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if args.report:
        args.report.mkdir(parents=True, exist_ok=True)
        report(args.out, args.report)
        return
    began = time.monotonic()
    passages = collect(args.data)
    items = build_items(passages)
    check_splits(passages, items)
    write_tasks(items, args.out / "tasks")
    write_examples(items, args.out / "examples.yaml")
    for domain in DOMAINS:
        counts = {split: len(items[domain][split]) for split in SPLITS}
        size = sum(len(p.text) for p in passages[domain]["train"])
        print(f"{domain}: items {counts}, training text {size / 1e6:.2f} MB", flush=True)
    build_family_a(args.base, passages, args.out / "models")
    build_family_b(passages, args.out / "models")
    print(f"done in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
