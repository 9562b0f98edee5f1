"""Building a composite from what the merge stage left."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from composer.artefacts import Store, digest
from composer.errors import RecipeError
from composer.evaluation.scores import Scorer
from composer.evaluation.statistics import paired_gain
from composer.merging.plan import MergeOutcome
from composer.mixture.card import model_card
from composer.mixture.composite import MANIFEST, Composite, Expert
from composer.mixture.examples import with_examples
from composer.mixture.levels import mix_inside
from composer.mixture.routing import Known, brief_of, candidates_of
from composer.mixture.settings import MixtureSection
from composer.zoo import Checkpoint, Zoo
from routers import ROUTERS, SIMPLE, Policy, Router

VERSION = 2
"""Changes when the same experts and settings give another composite."""


def choose_experts(
    zoo: Zoo,
    outcomes: list[MergeOutcome],
    score: Scorer,
    most: int | None = None,
    protect: Sequence[str] = (),
) -> tuple[tuple[Expert, ...], dict[str, str]]:
    """Decide which models are experts.

    Every merged model is one, and so is every model that was not merged, with one exception: a model whose
    merge was tried and rejected stays only if it beats its cluster's best (the merged model, else the best
    member) on some proxy task.

    Args:
        zoo: The sources and their example requests.
        outcomes: One per cluster.
        score: Scores a checkpoint on the proxy split; only asked where a merge was rejected, or there are too many
            parameters.
        most: Parameters that all experts together may have.
        protect: Tasks that must not drop: being ahead on one of them at all is enough to stay.

    Returns:
        The experts, and the models left out with the reason.

    Raises:
        RecipeError: if even a single expert has more parameters than that.
    """
    experts: list[Expert] = []
    left_out: dict[str, str] = {}
    for outcome in outcomes:
        if outcome.result is not None:
            experts.append(
                Expert(
                    id=outcome.result.id,
                    checkpoint=outcome.result,
                    members=outcome.merged,
                    examples=tuple(text for name in outcome.merged for text in zoo.examples.get(name, ())),
                    groups=tuple(len(zoo.examples.get(name, ())) for name in outcome.merged),
                    reason=f"merged from {', '.join(outcome.merged)}",
                )
            )
        best = outcome.result or _best(zoo, outcome, score)
        for name in outcome.whole:
            reason = _reason_to_keep(zoo[name], best, outcome, score, protect)
            if reason is None:
                left_out[name] = (
                    f"merging it in does not pay on the proxy split, and it beats {best.id} on no proxy task"
                )
                continue
            experts.append(
                Expert(
                    id=name,
                    checkpoint=zoo[name],
                    members=(name,),
                    examples=zoo.examples.get(name, ()),
                    reason=reason,
                )
            )
    return _within(experts, most, left_out, score), left_out


def _within(experts: list[Expert], most: int | None, left_out: dict[str, str], score: Scorer) -> tuple[Expert, ...]:
    """Leave out the experts that score lowest until the others have few enough parameters."""
    kept = list(experts)
    while most is not None and (total := sum(one.checkpoint.parameters for one in kept)) > most:
        if len(kept) == 1:
            raise RecipeError(
                f"mixture.max_parameters: {most:,} is less than expert '{kept[0].id}' has alone ({total:,})"
            )
        worst = min(kept, key=lambda one: score(one.checkpoint).mean)
        kept.remove(worst)
        left_out |= dict.fromkeys(
            worst.members,
            f"{worst.id} scores lowest on the proxy split, and with it the experts have {total:,} parameters; "
            f"mixture.max_parameters is {most:,}",
        )
    return tuple(kept)


def _best(zoo: Zoo, outcome: MergeOutcome, score: Scorer) -> Checkpoint:
    """Return the best member of a cluster without a merged model; without trials nothing hangs on which it is."""
    members = [zoo[name] for name in outcome.whole]
    return max(members, key=lambda one: score(one).mean) if outcome.trials else members[0]


def _reason_to_keep(
    member: Checkpoint, best: Checkpoint, outcome: MergeOutcome, score: Scorer, protect: Sequence[str]
) -> str | None:
    if outcome.failure:
        return f"kept whole, since its cluster could not be merged: {outcome.failure}"
    rejected = any(not trial.accepted and member.id in trial.step.inputs for trial in outcome.trials)
    if not rejected:
        return "kept whole"
    if member.id == best.id:
        return "kept whole: the best of its cluster, where no merge pays on the proxy split"
    merged, own = score(best), score(member)
    gains = {task.task: paired_gain(own.on(task.task), merged) for task in own.tasks}
    won = [task for task, gain in gains.items() if gain.beyond(0 if task in protect else 1)]
    return f"kept whole: merging it does not pay, but it is ahead on {', '.join(won)}" if won else None


def build_composite(
    name: str,
    experts: tuple[Expert, ...],
    left_out: dict[str, str],
    section: MixtureSection,
    store: Store,
    known: Known,
) -> Path:
    """Write a composite: manifest, router weights and model card.

    Args:
        name: What the composite is called on the endpoint.
        experts: At least one.
        left_out: Models that are in no expert, with the reason.
        section: The recipe's `mixture`.
        store: Where the composite is kept.
        known: What can be found out about the experts; asked only where something hangs on it.

    Returns:
        The composite's directory.

    Raises:
        RecipeError: if a name in the section is no expert, or the experts do not fit the level.
        RouterError: if the router cannot be built.
    """
    brief = None
    if len(experts) > 1:
        if section.router.kind not in SIMPLE:
            experts = with_examples(experts, known)
        brief = brief_of(experts, section, known)
    key = digest(
        [
            VERSION,
            name,
            [expert.model_dump() for expert in experts],
            left_out,
            section.model_dump(),
            brief.model_dump() if brief else None,
            _content(section.router.encoder),
        ]
    )
    path = store.path("composites", key)
    if path.exists():
        return path
    with store.new_directory("composites", key) as directory:
        router = gates = None
        if brief is not None and section.inside:
            whole, gates = mix_inside(f"{name}-{section.level}", experts, section, brief, store)
            experts = (whole,)
        elif brief is not None:
            router = ROUTERS.get(section.router.kind).build(brief, directory)
        composite = Composite(name=name, experts=experts, router=router, gates=gates, left_out=left_out)
        composite.save(directory / MANIFEST)
        (directory / "README.md").write_text(model_card(composite))
    return path


def _content(encoder: str) -> list[list[object]]:
    """Return name, size and time of the files of an encoder that is a directory."""
    home = Path(encoder)
    files = sorted(home.iterdir()) if home.is_dir() else []
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def with_policy(directory: Path, policy: Policy, store: Store) -> Path:
    """Return the directory of the same composite with another policy of its router.

    Args:
        directory: The composite; it has a router.
        policy: What turns scores into decisions.
        store: Where the new one is kept.
    """
    composite = Composite.open(directory)
    if composite.router is None:
        raise ValueError("a single expert needs no policy")
    changed = composite.model_copy(update={"router": composite.router.model_copy(update={"policy": policy})})
    key = digest([directory.name, policy.model_dump()])
    path = store.path("composites", key)
    if not path.exists():
        with store.new_directory("composites", key) as new:
            shutil.copytree(directory, new, dirs_exist_ok=True)
            changed.save(new / MANIFEST)
            (new / "README.md").write_text(model_card(changed))
    return path


def load_router(directory: Path) -> Router | None:
    """Load the router of a composite; None if it has a single expert.

    Raises:
        RouterError: if its encoder cannot be loaded.
    """
    composite = Composite.open(directory)
    if composite.router is None:
        return None
    return ROUTERS.get(composite.router.kind).load(composite.router, directory, candidates_of(composite.experts))
