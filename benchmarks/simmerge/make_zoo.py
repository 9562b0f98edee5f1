"""Make a training zoo: fine-tunes of one small base on real data, good, little, mixed, conflicting and broken ones.

    COMPOSER_DATA=DIR python benchmarks/simmerge/make_zoo.py --base CHECKPOINT --out DIR [--seed N] [--only NAME ...]

Each is written as a Hugging Face directory DIR/NAME; one that is there is not made again. LoRA fine-tunes are folded
in. COMPOSER_DATA holds the data sets as JSON lines (see tasks/loaders.py for the names); the weights are not ours to
give away, so they are made anew. Fine-tunes of a 15M base take about a minute each on 2 cores.
"""

import argparse
import random
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent / "tasks"))
import loaders

BATCH_TOKENS = 512
ORDER = 512
"""Texts that are sorted by length together."""
EPOCHS = 3
"""Times that texts are read, at most."""


@dataclass(frozen=True)
class Tuning:
    """One fine-tune."""

    domains: tuple[str, ...]
    tokens: int = 100_000
    """Tokens it reads, at most."""
    rate: float = 8e-4
    """Highest learning rate; of a LoRA, twice that."""
    rank: int | None = None
    """Of its LoRA; None for a full fine-tune."""
    part: tuple[int, int] = (0, 1)
    """The share of the texts it learns, (n, of): texts whose number is n modulo `of`."""
    lies: bool = False
    """Learns wrong labels."""
    noise: float = 0.0
    """Random numbers added to every weight, times the weights' standard deviation."""


ZOO = {
    "sst2": Tuning(("sst2",), tokens=150_000),
    "sst2-little": Tuning(("sst2",), tokens=40_000, part=(1, 2)),
    "sst2-lora": Tuning(("sst2",), tokens=200_000, rank=16, part=(0, 2)),
    "sst2-liar": Tuning(("sst2",), tokens=80_000, lies=True),
    "agnews": Tuning(("agnews",), tokens=500_000),
    "agnews-other": Tuning(("agnews",), tokens=300_000, part=(1, 2)),
    "science": Tuning(("science",)),
    "science-lora": Tuning(("science",), rank=16),
    "math": Tuning(("math",)),
    "math-little": Tuning(("math",), tokens=20_000, rank=4),
    "math-lora": Tuning(("math",), rank=16),
    "code": Tuning(("code",)),
    "piqa": Tuning(("piqa",)),
    "social": Tuning(("social",)),
    "play": Tuning(("play",)),
    "wiki": Tuning(("wiki",)),
    "chat": Tuning(("chat",)),
    "sst2-agnews": Tuning(("sst2", "agnews"), tokens=400_000),
    "science-math": Tuning(("science", "math"), tokens=140_000),
    "code-noise": Tuning(("code",), noise=0.3),
    "math-diverged": Tuning(("math",), tokens=20_000, rate=3e-2),
}


def learnt(tuning: Tuning, seed: int) -> list[loaders.Text]:
    """Return the texts of a fine-tune in the order they are read."""
    dice = random.Random(seed)  # noqa: S311
    number, of = tuning.part
    found = []
    for domain in tuning.domains:
        texts = loaders.texts(domain)[number::of]
        if tuning.lies:
            answers = sorted({answer for _, answer in texts})
            texts = [(text, dice.choice([one for one in answers if one != answer])) for text, answer in texts]
        dice.shuffle(texts)
        found.append(texts)
    # Domains take turns, so that a bound on tokens cuts none of them off.
    return [text for turn in zip(*found, strict=False) for text in turn]


def tune(model: torch.nn.Module, tokenizer: object, tuning: Tuning, seed: int) -> None:
    """Teach a model the texts of a tuning: AdamW, cosine schedule, the loss on the answers only."""
    torch.manual_seed(seed)
    longest = model.config.max_position_embeddings
    samples, total = [], 0
    texts = learnt(tuning, seed)
    for text, answer in (one for _ in range(EPOCHS) for one in texts):
        # Together, as they are asked: many tokenizers put a blank before what they are given alone.
        before = len(tokenizer(text).input_ids)  # type: ignore[operator]
        ids = tokenizer(text + answer).input_ids[:longest]  # type: ignore[operator]
        if before < len(ids):
            samples.append((ids, before))
            total += len(ids)
        if total >= tuning.tokens:
            break
    batches: list[list[tuple[list[int], int]]] = []
    for start in range(0, len(samples), ORDER):
        batch: list[tuple[list[int], int]] = []
        for one in sorted(samples[start : start + ORDER], key=lambda sample: len(sample[0])):
            if batch and (len(batch) + 1) * len(one[0]) > BATCH_TOKENS:
                batches.append(batch)
                batch = []
            batch.append(one)
        batches.append(batch)
    random.Random(seed).shuffle(batches)  # noqa: S311
    parameters = [one for one in model.parameters() if one.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=2 * tuning.rate if tuning.rank else tuning.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=optimiser.param_groups[0]["lr"], total_steps=len(batches), pct_start=0.1
    )
    model.train()
    for batch in batches:
        width = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([[*one, *[0] * (width - len(one))] for one, _ in batch])
        places = [(row, place) for row, (one, before) in enumerate(batch) for place in range(before - 1, len(one) - 1)]
        rows, columns = torch.tensor(places).T
        # Logits where an answer is predicted only: with a large vocabulary they are most of the work.
        body = model.base_model.model.model if tuning.rank else model.model
        hidden = body(input_ids=ids, attention_mask=(torch.arange(width) < torch.tensor([[len(o)] for o, _ in batch])))
        logits = model.get_output_embeddings()(hidden.last_hidden_state[rows, columns])
        loss = torch.nn.functional.cross_entropy(logits, ids[rows, columns + 1])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()


def make(name: str, base: Path, out: Path, seed: int) -> None:
    """Make one fine-tune; nothing half-made is left behind."""
    tuning = ZOO[name]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    stored = AutoModelForCausalLM.from_pretrained(base, dtype="auto").dtype
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(seed)
    if tuning.rank:
        config = LoraConfig(r=tuning.rank, lora_alpha=2 * tuning.rank, target_modules="all-linear")
        model = get_peft_model(model, config)
    tune(model, tokenizer, tuning, seed)
    if tuning.rank:
        model = model.merge_and_unload()
    with torch.no_grad():
        for parameter in model.parameters():
            if tuning.noise and parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter) * parameter.std() * tuning.noise)
    partial = out / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.to(stored).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(out / name)


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=list(ZOO), choices=list(ZOO))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        if (options.out / name).is_dir():
            continue
        began = time.monotonic()
        make(name, options.base, options.out, options.seed)
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
