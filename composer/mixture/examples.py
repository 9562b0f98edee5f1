"""Example requests for experts whose recipe gives none, from the models themselves."""

from collections.abc import Callable, Sequence
from math import log
from pathlib import Path

from ruamel.yaml import YAML

from composer.artefacts import Store
from composer.evaluation.statistics import paired_gain
from composer.mixture.composite import Expert
from composer.mixture.routing import Known
from composer.probes import record_probes

ENOUGH = 8
"""Examples that are derived for an expert."""
FEWEST = 2
"""Texts that an expert gets that predicts none better than all others."""
LONGEST = 600
"""Characters of an example that are kept."""


def with_examples(experts: Sequence[Expert], known: Known) -> tuple[Expert, ...]:
    """Return experts, each with example requests; those that have some keep them.

    The first of these that gives any: the `widget` examples of the model card; the prompts of the tasks that the expert
    is ahead of all others on (proxy items); the probe texts that it predicts best, compared with the others.

    Args:
        experts: All experts.
        known: What can be found out about them.
    """
    if all(expert.examples for expert in experts) or len(experts) < 2:
        return tuple(experts)
    found: list[Expert] = []
    taken = {frozenset(expert.examples) for expert in experts if expert.examples}
    for expert in experts:
        if expert.examples:
            found.append(expert)
            continue
        sources: list[Callable[[], tuple[tuple[str, ...], str]]] = [
            lambda expert=expert: (_of_card(expert), "its model card"),  # type: ignore[misc]
            lambda expert=expert: _of_tasks(expert, experts, known),  # type: ignore[misc]
            lambda expert=expert: (_of_losses(expert, experts, known), "the probe texts that it predicts best"),  # type: ignore[misc]
        ]
        for source in sources:
            examples, origin = source()
            # Fine-tunes that kept the card of their base say the same.
            if examples and frozenset(examples) not in taken:
                break
        taken.add(frozenset(examples))
        found.append(expert.model_copy(update={"examples": examples, "examples_from": origin}))
    return tuple(found)


def card_examples(card: str) -> tuple[str, ...]:
    """Return the `widget` examples of a model card's front matter: texts, and first user messages of chats.

    What a card says is data: it can become an example, nothing else.
    """
    parts = card.split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return ()
    try:
        front = YAML(typ="safe").load(parts[1])
    except Exception:  # whatever the text of a card makes the parser stumble over
        return ()
    widget = front.get("widget") if isinstance(front, dict) else None
    texts = []
    for one in widget if isinstance(widget, list) else []:
        text = one.get("text") if isinstance(one, dict) else None
        messages = one.get("messages") if isinstance(one, dict) else None
        if isinstance(messages, list):
            asked = [m.get("content") for m in messages if isinstance(m, dict) and m.get("role") == "user"]
            text = asked[0] if asked else None
        if isinstance(text, str) and text.strip():
            texts.append(text.strip()[:LONGEST])
    return tuple(dict.fromkeys(texts))[:ENOUGH]


def _of_card(expert: Expert) -> tuple[str, ...]:
    checkpoint = expert.checkpoint
    if checkpoint.lineage is not None:  # what was merged has no card of its own
        return ()
    for home in (checkpoint.source.adapter, checkpoint.home):
        card = Path(home) / "README.md" if home else None
        if card is not None and card.is_file():
            return card_examples(card.read_text(encoding="utf-8", errors="replace"))
    return ()


def _of_tasks(expert: Expert, experts: Sequence[Expert], known: Known) -> tuple[tuple[str, ...], str]:
    own = known.score(expert.checkpoint)
    others = [known.score(other.checkpoint) for other in experts if other.id != expert.id]
    won = [
        task.task
        for task in own.tasks
        if all(paired_gain(own.on(task.task), other.on(task.task)).beyond(1) for other in others)
    ]
    if not won:
        return (), ""
    texts = known.contexts()
    # Tasks take turns, so that each is there.
    turns = zip(*(list(texts[task].values())[:ENOUGH] for task in won), strict=False)
    chosen = tuple(text[:LONGEST] for turn in turns for text in turn)[:ENOUGH]
    return chosen, f"the proxy items of {', '.join(won)}, where it is ahead of all others"


def _of_losses(expert: Expert, experts: Sequence[Expert], known: Known) -> tuple[str, ...]:
    texts, table = known.losses(experts)
    place = [one.id for one in experts].index(expert.id)
    others = [row for number, row in enumerate(table) if number != place]
    lead = [min(row[n] for row in others) - table[place][n] for n in range(len(texts))]
    ranked = sorted(range(len(texts)), key=lambda n: -lead[n])
    # Texts that another predicts better are another's, unless there are no others.
    ahead = [n for n in ranked if lead[n] > 0] or ranked[:FEWEST]
    return tuple(texts[n][:LONGEST] for n in ahead[:ENOUGH])


def text_losses(experts: Sequence[Expert], texts: Sequence[str], store: Store) -> list[list[float]]:
    """Return what texts cost experts, in bits per byte, `[experts][texts]`: comparable over tokenizers.

    The first token of a text has nothing before it and is not predicted.
    """
    import torch

    found = []
    for expert in experts:
        record = record_probes(expert.checkpoint, texts, store)
        nats = torch.nan_to_num(record.arrays["next"].double())
        own, start = [], 0
        for text, tokens in zip(texts, record.tokens, strict=True):
            own.append(float(-nats[start : start + len(tokens)].sum()) / max(len(text.encode()), 1) / log(2))
            start += len(tokens)
        found.append(own)
    return found
