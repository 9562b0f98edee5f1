"""What a router is built from: the experts, their examples, and what they answer best."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from composer.errors import RecipeError
from composer.evaluation.scores import Scorer, Scores
from composer.mixture.composite import Expert
from composer.mixture.settings import BALANCED, MixtureSection
from composer.registry import nearest
from routers import Brief, Candidate, Labelled, Policy

SHARP = 8.0
"""Odds of an expert that predicts a text better than another by the usual spread between experts."""

Contexts = Callable[[], Mapping[str, Mapping[str, str]]]
"""Gives the prompts of the proxy items: by task, then by item hash."""
Losses = Callable[[Sequence[Expert]], tuple[Sequence[str], Sequence[Sequence[float]]]]
"""Gives the probe texts, and what each expert needs to predict each, in bits per byte, `[experts][texts]`."""


def candidates_of(experts: Sequence[Expert]) -> tuple[Candidate, ...]:
    """Return experts as routers see them."""
    return tuple(
        Candidate(
            id=expert.id,
            path=expert.checkpoint.path,
            parameters=expert.checkpoint.parameters,
            remote_code=expert.checkpoint.remote_code,
            examples=expert.examples,
            groups=expert.groups,
        )
        for expert in experts
    )


@dataclass(frozen=True)
class Known:
    """What can be found out about experts; each is asked only where something hangs on it."""

    score: Scorer
    """Scores a checkpoint on the proxy split."""
    contexts: Contexts
    losses: Losses


def brief_of(experts: Sequence[Expert], mixture: MixtureSection, known: Known) -> Brief:
    """Return what a router is to be built for.

    Args:
        experts: Two or more.
        mixture: The recipe's section.
        known: What can be found out about them.

    Raises:
        RecipeError: if a name in the section is no expert, or the file of labelled texts is not one.
    """
    section, names = mixture.router, [expert.id for expert in experts]
    for key, own in (("abstain_to", [section.abstain_to]), ("weights", list(section.weights))):
        for name in own:
            if name not in (*names, "auto"):
                close = nearest(name, names)
                raise RecipeError(
                    f"mixture.router.{key}: '{name}' is no expert{close} (the experts are: {', '.join(names)})"
                )
    fallback = section.abstain_to
    if mixture.inside:
        fallback = names[0]  # there is no falling back inside a model
    elif fallback == "auto":
        fallback = max(experts, key=lambda expert: known.score(expert.checkpoint).mean).id
    labelled: list[Labelled] = []
    if section.learn_from == "proxy":
        labelled += by_scores({expert.id: known.score(expert.checkpoint) for expert in experts}, known.contexts())
    elif section.learn_from == "language":
        labelled += by_losses(names, *known.losses(experts))
    if section.labelled:
        labelled += read_labelled(Path(section.labelled), names)
    return Brief(
        candidates=candidates_of(experts),
        policy=Policy(
            abstain_to=fallback,
            threshold=section.threshold,
            temperature=section.temperature,
            weights=section.weights,
            tie=section.tie,
            scope=section.scope,
            costs={expert.id: float(expert.checkpoint.parameters) for expert in experts},
        ),
        encoder=section.encoder,
        layer=section.layer,
        most_layers=BALANCED if section.preset == "balanced" else None,
        table=section.preset == "fast",
        labelled=tuple(labelled),
    )


def by_scores(scores: Mapping[str, Scores], contexts: Mapping[str, Mapping[str, str]]) -> list[Labelled]:
    """Return every item's prompt with the experts that answer it best, those that are equal with equal shares.

    Items that all experts answer equally well teach nothing and are left out.
    """
    found = []
    for task, texts in contexts.items():
        values = {name: own.task(task).items for name, own in scores.items()}
        for item, text in texts.items():
            own = {name: items[item] for name, items in values.items()}
            best = [name for name, value in own.items() if value == max(own.values())]
            if len(best) < len(own):
                found.append(Labelled(text=text, shares=dict.fromkeys(best, 1 / len(best))))
    return found


def by_losses(names: Sequence[str], texts: Sequence[str], losses: Sequence[Sequence[float]]) -> list[Labelled]:
    """Return every text with the experts that predict it best.

    To minimise the expected loss of the expert that is chosen is to send each text to where it is lowest; the softmax
    lets those that are nearly equal share.
    """
    import numpy as np

    table = np.array(losses).T
    behind = table - table.min(axis=1, keepdims=True)
    odds = np.exp(-behind / max(float(table.std(axis=1).mean()), 1e-9) * np.log(SHARP))
    shares = odds / odds.sum(axis=1, keepdims=True)
    return [
        Labelled(text=text, shares=dict(zip(names, row.tolist(), strict=True)))
        for text, row in zip(texts, shares, strict=True)
    ]


def read_labelled(path: Path, names: Sequence[str]) -> list[Labelled]:
    """Read a file of labelled texts.

    Raises:
        RecipeError: with the line that is wrong, and why.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"mixture.router.labelled: {path} cannot be read: {error}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text, expert = str(row["text"]), str(row["expert"])
        except (ValueError, KeyError, TypeError):
            raise RecipeError(f'{path}:{number} is not {{"text": …, "expert": …}}') from None
        if expert not in names:
            raise RecipeError(
                f"{path}:{number}: '{expert}' is no expert{nearest(expert, list(names))} "
                f"(the experts are: {', '.join(names)})"
            )
        found.append(Labelled(text=text, shares={expert: 1.0}))
    return found
