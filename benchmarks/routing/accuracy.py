"""How often a router finds the domain of a real prompt, by encoder, depth, pooling and kind of gates.

    COMPOSER_ZOO=DIR COMPOSER_DATA=DIR python benchmarks/routing/accuracy.py [PART ...] --store DIR [--most SHARE]

Parts: depth (every layer of each encoder), kinds (all routers at the layer that leave-one-out chooses), unseen (data
sets that a fitted router saw and did not see), unknown (prompts of no expert's domain), tables (lookups). Accuracy is
the mean over seven domains of the share of their prompts that find them, in percent, chance 14.3; intervals are 95 %
bootstrap intervals over prompts. The label is the domain, not the expert that would answer best: regret.py measures
that. Features are kept in the store.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from prompts import UNNAMED, Prompt, examples, keywords, labelled, load
from sklearn.cluster import KMeans

from composer.artefacts import digest
from composer.cli import _quiet_libraries
from routers import Candidate
from routers.encoders import features_by_layer, load_encoder, make_table
from routers.gated import Gates, Tried, chosen_of, clearness, left_out, macro
from routers.linear import FittedGates
from routers.mlp import MLPGates
from routers.policy import Policy
from routers.prompt import LinearGates
from routers.prompt_glue import GlueGates

PARTS = ("depth", "kinds", "unseen", "unknown", "tables")
ENCODERS = ("smollm2-135m-instruct", "stories15m", "qwen2.5-coder-0.5b-instruct")
DEEPEST = {"smollm2-135m-instruct": 30, "stories15m": 6, "qwen2.5-coder-0.5b-instruct": 8}
"""Layers that are read; each of the last one's costs 60 ms a prompt."""
RESAMPLES = 1000


@dataclass
class Features:
    """Reads texts with encoders, each text once."""

    zoo: Path
    store: Path

    def of(self, encoder: str, texts: Sequence[str], pool: str = "mean", *, bos: bool = False) -> torch.Tensor:
        """Return the features of texts after every layer, `[layers, texts, hidden]`."""
        kept = self.store / f"{encoder}-{digest([pool, bos, DEEPEST[encoder], list(texts)])[:16]}.pt"
        if not kept.is_file():
            one = Candidate(id=encoder, path=str(self.zoo / encoder), parameters=0)
            found = features_by_layer(one, texts, DEEPEST[encoder], pool=pool, bos=bos)  # type: ignore[arg-type]
            kept.parent.mkdir(parents=True, exist_ok=True)
            torch.save(found.half(), kept)
        loaded: torch.Tensor = torch.load(kept, weights_only=True)
        return loaded.float()


def shares(texts: dict[str, list[str]]) -> torch.Tensor:
    """Return which domain each example is of, `[examples, domains]`."""
    labels = [place for place, own in enumerate(texts.values()) for _ in own]
    return torch.nn.functional.one_hot(torch.tensor(labels), len(texts)).float()


def flat(texts: dict[str, list[str]]) -> list[str]:
    """Return all examples in one list."""
    return [text for own in texts.values() for text in own]


def accuracy(scores: torch.Tensor, domains: Sequence[str], names: Sequence[str]) -> list[float]:
    """Return the macro accuracy with its interval, in percent."""
    right = np.array([names[int(one)] == own for one, own in zip(scores.argmax(1), domains, strict=True)])
    kinds = [np.flatnonzero([own == name for own in domains]) for name in sorted(set(domains))]
    dice = np.random.default_rng(0)
    draws = [np.mean([right[dice.choice(own, len(own))].mean() for own in kinds]) for _ in range(RESAMPLES)]
    values = (np.mean([right[own].mean() for own in kinds]), *np.percentile(draws, [2.5, 97.5]))
    return [round(100 * float(one), 1) for one in values]


def show(part: str, **values: object) -> None:
    """Print a result."""
    print(json.dumps({"part": part, **values}), flush=True)


@dataclass
class Bench:
    """What all parts share."""

    features: Features
    prompts: list[Prompt]

    @property
    def named(self) -> list[Prompt]:
        """Prompts of a domain that some expert is for."""
        return [one for one in self.prompts if one.domain != UNNAMED]

    @property
    def domains(self) -> list[str]:
        """Their domains."""
        return [one.domain for one in self.named]

    def tested(self, encoder: str, *, bos: bool = False) -> torch.Tensor:
        """Return the features of the prompts that have a domain, `[layers, prompts, hidden]`."""
        return self.features.of(encoder, [one.text for one in self.named], bos=bos)

    def chosen_layer(self, encoder: str, count: int) -> tuple[int, float]:
        """Return the layer that leave-one-out chooses, as a router does, and the figure it goes by."""
        own = examples(count)
        read = self.features.of(encoder, flat(own))
        found = [left_out(LinearGates(), layer, shares(own)) for layer in read]
        tried = [
            Tried(macro([one.pair for one in left]), clearness(left), layer, 0, encoder)
            for layer, left in enumerate(found)
        ]
        best = chosen_of(tried)
        return best.layer, round(best.accuracy, 3)


def depth(bench: Bench) -> None:
    """Every layer of each encoder, by gates that learn nothing and gates that are fitted."""
    for encoder in ENCODERS:
        tests = bench.tested(encoder)
        for count in (5, 10):
            own = examples(count)
            names = list(own)
            read = bench.features.of(encoder, flat(own))
            for layer in range(len(read)):
                row = {}
                for kind, gates in (("prompt", LinearGates()), ("linear", FittedGates())):
                    scores = gates.score(gates.fit(read[layer], shares(own)), tests[layer])
                    row[kind] = accuracy(scores, bench.domains, names)[0]
                health = round(macro([one.pair for one in left_out(LinearGates(), read[layer], shares(own))]), 3)
                show("depth", encoder=encoder, layer=layer, requests=count, leave_one_out=health, **row)


def kinds(bench: Bench) -> None:
    """All kinds of routers, at the layer that leave-one-out chooses."""
    for encoder in ENCODERS:
        for count in (5, 10):
            own = examples(count)
            names = list(own)
            layer, health = bench.chosen_layer(encoder, count)
            read, tests = bench.features.of(encoder, flat(own))[layer], bench.tested(encoder)[layer]
            base = {"encoder": encoder, "layer": layer, "requests": count, "leave_one_out": health}
            last = bench.features.of(encoder, flat(own), "last")[layer]
            for kind, gates, seen in (
                ("prompt", LinearGates(), read),
                ("prompt, gates of the last token", LinearGates(), last),
                ("linear", FittedGates(), read),
                ("mlp", MLPGates(), read),
            ):
                scores = gates.score(gates.fit(seen, shares(own)), tests)
                show("kinds", kind=kind, **base, accuracy=accuracy(scores, bench.domains, names))
            if count == 10:
                means = KMeans(len(names), n_init=10, random_state=0)
                deviation = read.std(0).clamp_min(1e-6)
                groups = means.fit_predict(((read - read.mean(0)) / deviation).numpy())
                owner = [
                    int(np.bincount(shares(own).argmax(1)[groups == g], minlength=len(names)).argmax())
                    for g in range(len(names))
                ]
                found = means.predict(((tests - read.mean(0)) / deviation).numpy())
                scores = torch.nn.functional.one_hot(torch.tensor([owner[g] for g in found]), len(names)).float()
                show("kinds", kind="k-means of the requests", **base, accuracy=accuracy(scores, bench.domains, names))
        words = keywords(5)
        glue, tests = GlueGates(), bench.tested(encoder, bos=True)
        for texts, what in ((words, "keywords"), (examples(5), "requests")):
            read = bench.features.of(encoder, flat(texts), "last", bos=True)
            found_layers = [
                accuracy(glue.score(glue.fit(read[k], shares(texts)), tests[k]), bench.domains, list(texts))
                for k in range(len(read))
            ]
            best = max(range(len(read)), key=lambda k: found_layers[k][0])
            show("kinds", kind=f"prompt_glue, {what}", encoder=encoder, best_layer_in_hindsight=best,
                 accuracy=found_layers[best], median_layer=float(np.median([x[0] for x in found_layers])))  # fmt: skip


def unseen(bench: Bench) -> None:
    """Fitted with labelled prompts: on data sets that it saw, and on data sets that were left out."""
    encoder = ENCODERS[0]
    layer, _ = bench.chosen_layer(encoder, 10)
    own = examples(10)
    names = list(own)
    more = labelled(16)
    read = bench.features.of(encoder, flat(own))[layer]
    taught = bench.features.of(encoder, [one.text for one in more])[layer]
    labels = torch.nn.functional.one_hot(torch.tensor([names.index(one.domain) for one in more]), len(names)).float()
    tests = bench.tested(encoder)[layer]
    gates: Gates = FittedGates()

    def fitted(kept: torch.Tensor) -> torch.Tensor:
        weights = gates.fit(torch.cat([read, taught[kept]]), torch.cat([shares(own), labels[kept]]))
        return gates.score(weights, tests)

    whole = fitted(torch.ones(len(more), dtype=torch.bool))
    show("unseen", labelled=len(more), encoder=encoder, layer=layer, accuracy=accuracy(whole, bench.domains, names))
    alone = gates.score(gates.fit(read, shares(own)), tests)
    for source in sorted({one.source for one in bench.named}):
        rows = torch.tensor([one.source == source for one in bench.named])
        domain = next(one.domain for one in bench.named if one.source == source)
        without = fitted(torch.tensor([one.source != source for one in more]))
        share = {
            name: round(100 * float((scores[rows].argmax(1) == names.index(domain)).float().mean()), 1)
            for name, scores in (("requests_only", alone), ("seen", whole), ("unseen", without))
        }
        show("unseen", source=source, prompts=int(rows.sum()), **share)


def unknown(bench: Bench) -> None:
    """What confidence says: accuracy of what it is surest of, and of prompts that belong to no expert."""
    encoder = ENCODERS[0]
    policy = Policy(abstain_to="")
    for kind, gates, count in (("prompt", LinearGates(), 5), ("linear", FittedGates(), 10)):
        layer, _ = bench.chosen_layer(encoder, count)
        own = examples(count)
        names = list(own)
        weights = gates.fit(bench.features.of(encoder, flat(own))[layer], shares(own))
        others = [one for one in bench.prompts if one.domain == UNNAMED]
        sets = {"named": bench.named, UNNAMED: others}
        sure, right = {}, np.zeros(0)
        for name, prompts in sets.items():
            scores = gates.score(weights, bench.features.of(encoder, [one.text for one in prompts])[layer])
            decisions = [policy.decide(dict(zip(names, row.tolist(), strict=True))) for row in scores]
            sure[name] = np.array([one.confidence for one in decisions])
            if name == "named":
                right = np.array([one.expert == own.domain for one, own in zip(decisions, prompts, strict=True)])
        order = np.argsort(-sure["named"])
        kept = {
            f"{share:.0%}": round(100 * float(right[order[: round(share * len(order))]].mean()), 1)
            for share in (1.0, 0.9, 0.8, 0.6)
        }
        apart = float(np.mean(sure["named"][:, None] > sure[UNNAMED][None]))
        show(
            "unknown",
            kind=kind,
            requests=count,
            layer=layer,
            accuracy_at_coverage=kept,
            named_against_unnamed=round(apart, 3),
        )


def tables(bench: Bench) -> None:
    """Lookups made from encoders."""
    texts = [one.text for one in bench.named]
    for encoder in ENCODERS[:2]:
        one = Candidate(id=encoder, path=str(bench.features.zoo / encoder), parameters=0)
        for layer in (0, 2, 4, 8):
            if layer > DEEPEST[encoder]:
                continue
            with tempfile.TemporaryDirectory() as home:
                made = make_table(encoder, layer, [one], Path(home))
                read = load_encoder(made, Path(home), [one])
                size = sum(file.stat().st_size for file in Path(home).iterdir())
                tests = torch.stack([read(text) for text in texts])
                for count in (5, 10):
                    own = examples(count)
                    seen = torch.stack([read(text) for text in flat(own)])
                    row = {}
                    for kind, gates in (("prompt", LinearGates()), ("linear", FittedGates())):
                        scores = gates.score(gates.fit(seen, shares(own)), tests)
                        row[kind] = accuracy(scores, bench.domains, list(own))
                    show("tables", encoder=encoder, layer=layer, requests=count, megabytes=round(size / 1e6, 1), **row)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", default=PARTS)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--most", type=float, default=1.0, help="share of the prompts")
    options = parser.parse_args()
    _quiet_libraries()
    zoo = os.environ.get("COMPOSER_ZOO")
    if not zoo:
        parser.error("set COMPOSER_ZOO to the folder with the checkpoints")
    bench = Bench(Features(Path(zoo), options.store), load(options.most))
    for name in options.parts:
        {"depth": depth, "kinds": kinds, "unseen": unseen, "unknown": unknown, "tables": tables}[name](bench)


if __name__ == "__main__":
    main()
