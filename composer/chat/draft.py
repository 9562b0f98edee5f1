"""A recipe in the making: a plain document, and limits that a recipe does not hold.

Door: `changed`.
"""

import copy
from typing import Any

from composer.chat.edit import Edit
from composer.chat.shelf import Shelf
from composer.errors import RecipeError
from composer.merging.operators import OPERATORS
from composer.planning import Plan
from composer.recipe import Recipe, checked
from composer.value import Value
from composer.zoo.checkpoint import Description

TRIES = {
    "evolution": ("evolution", "trials"),
    "simmerge": ("simmerge", "tries"),
    "bandit": ("bandit", "rounds"),
}
"""Where a strategy keeps how often it tries; others try what there is to try."""


class Limits(Value):
    """What the plan is checked against; estimates, as the plan has them."""

    minutes: float | None = None
    memory_gb: float | None = None
    disk_gb: float | None = None

    def broken_by(self, plan: Plan) -> str | None:
        """Return in words the first limit that a plan does not keep, or None."""
        cost = plan.cost
        for limit, needed, what in (
            (self.minutes, cost.seconds / 60, "minutes"),
            (self.memory_gb, cost.memory_gb, "GB of RAM"),
            (self.disk_gb, cost.disk_gb, "GB of disk"),
        ):
            if limit is not None and needed > limit:
                return f"you said at most {limit:g} {what}, and the plan is estimated at {needed:.3g} {what}"
        return None


class Draft(Value):
    """A recipe in the making."""

    document: dict[str, Any]
    """The recipe as plain values: only what is not as by default."""
    limits: Limits = Limits()
    serve: bool = False
    """Whether the endpoint is to stay up after the run."""
    said: tuple[str, ...] = ()
    """The requests that led to it."""

    @property
    def recipe(self) -> Recipe:
        """The recipe.

        Raises:
            RecipeError: if it is none yet.
        """
        return checked(self.document)

    @property
    def models(self) -> tuple[str, ...]:
        """Ids of its models."""
        return tuple(entry["id"] for entry in self.document["zoo"]["models"])

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks that judge it."""
        return tuple(self.document.get("evaluate", {}).get("tasks", ()))


def begun(shelf: Shelf) -> Draft:
    """Return the draft a conversation begins with: the shelf's own recipe."""
    return Draft(document=copy.deepcopy(shelf.document))


def changed(draft: Draft, edit: Edit, shelf: Shelf, said: str = "") -> Draft:
    """Return a draft with what a request changes.

    Args:
        draft: What there is so far.
        edit: The changes.
        shelf: What may be named.
        said: The request in words.

    Raises:
        RecipeError: if a name is unknown, two wishes stand against each other, or one cannot be met; both are named.
    """
    _check_names(edit, shelf)
    _check_wishes(edit, shelf)
    draft = begun(shelf) if edit.fresh else draft
    document = copy.deepcopy(draft.document)
    _choose_models(document, edit, shelf)
    _set_merging(document, edit, [*draft.models] != [one["id"] for one in document["zoo"]["models"]])
    _set_tasks(document, edit)
    _set_values(document, edit)
    _check_mixture(document.get("mixture", {}))
    limits = draft.limits.model_copy(
        update={
            key: getattr(edit, key) if getattr(edit, key) is not None else (None if _lifted(edit, word) else old)
            for key, word, old in (
                ("minutes", "time", draft.limits.minutes),
                ("memory_gb", "memory", draft.limits.memory_gb),
                ("disk_gb", "disk", draft.limits.disk_gb),
            )
        }
    )
    done = Draft(
        document=_trimmed(document),
        limits=limits,
        serve=draft.serve if edit.serve is None else edit.serve,
        said=(*draft.said, said) if said else draft.said,
    )
    if done.tasks:
        done = done.model_copy(update={"document": done.recipe.model_dump(mode="json", exclude_defaults=True)})
    _check_possible(done, shelf)
    return done


def _lifted(edit: Edit, limit: str) -> bool:
    return limit in edit.forget or "all" in edit.forget


def _check_names(edit: Edit, shelf: Shelf) -> None:
    for name in (*(edit.models or ()), *edit.add, *edit.leave_out, *edit.whole):
        shelf.check(name)
    for task in (*(edit.tasks or ()), *edit.add_tasks, *edit.protect, *edit.weights):
        if task not in shelf.tasks and shelf.task(task) != (task,):
            near = " or ".join(f"'{one}'" for one in shelf.nearest_tasks(task))
            raise RecipeError(f"there is no task '{task}'; did you mean {near}?")


def _check_wishes(edit: Edit, shelf: Shelf) -> None:
    """Refuse two wishes of one request that stand against each other."""
    everything = set(edit.models or ()) == set(shelf.models)
    wanted = {*(() if everything else edit.models or ()), *edit.add, *edit.whole}
    for name in edit.leave_out:
        if name in wanted:
            raise RecipeError(f"'{name}' cannot be both used and left out; which of the two?")
    if edit.accept == "always" and edit.protect:
        raise RecipeError(
            f"'protect {', '.join(edit.protect)}' refuses merges that lose on it, and 'accept: always' keeps every "
            "merge; which of the two?"
        )
    if edit.strategy == "none" and edit.operators:
        raise RecipeError(
            f"'merge nothing' leaves operator {', '.join(edit.operators)} nothing to do; which of the two?"
        )


def _check_mixture(mixture: dict[str, Any]) -> None:
    level, router = mixture.get("level", "model"), mixture.get("router", {})
    if level == "model":
        return
    inside = "a gate inside the model, which is one linear layer"
    if router.get("preset", "accurate") != "accurate":
        raise RecipeError(
            f"level {level} and a {router['preset']} router stand against each other: {level} has {inside}"
        )
    if router.get("kind", "prompt") not in ("prompt", "linear", "prompt_glue"):
        raise RecipeError(f"level {level} and router {router['kind']} stand against each other: {level} has {inside}")


def _choose_models(document: dict[str, Any], edit: Edit, shelf: Shelf) -> None:
    current = [entry["id"] for entry in document["zoo"]["models"]]
    wanted = set(current if edit.models is None else edit.models) | set(edit.add) | set(edit.whole)
    wanted -= set(edit.leave_out)
    if not wanted:
        raise RecipeError("that leaves no model at all; keep at least one")
    document["zoo"]["models"] = [shelf.entry(name) for name in shelf.models if name in wanted]
    cluster = document.setdefault("cluster", {})
    again = set(edit.models or ()) - set(edit.whole)
    apart = [name for name in cluster.get("apart", []) if name in wanted and name not in again]
    cluster["apart"] = [*apart, *(name for name in edit.whole if name not in apart)]


def _set_merging(document: dict[str, Any], edit: Edit, other_models: bool) -> None:
    merge = document.setdefault("merge", {})
    if other_models and merge.get("strategy") == "fixed" and not edit.strategy:
        merge.pop("strategy")  # its merges are of models that may be gone; the default predicts instead
        merge.pop("merges", None)
    if edit.strategy:
        merge.pop("merges", None)
        merge["strategy"] = edit.strategy
    if edit.operators:
        merge["operators"] = list(edit.operators)
        if merge.get("strategy") in ("fixed", "none"):
            merge.pop("merges", None)
            merge.pop("strategy")
    if edit.tries is not None:
        strategy = merge.get("strategy", "simmerge")
        if strategy not in TRIES:
            raise RecipeError(
                f"strategy {strategy} has no number of tries: it tries what there is; {', '.join(TRIES)} have one"
            )
        section, key = TRIES[strategy]
        merge.setdefault(section, {})[key] = edit.tries
    if edit.accept:
        merge["accept"] = edit.accept
    if edit.seed is not None:
        merge["seed"] = edit.seed


def _set_tasks(document: dict[str, Any], edit: Edit) -> None:
    evaluate = document.setdefault("evaluate", {})
    tasks = list(edit.tasks if edit.tasks is not None else evaluate.get("tasks", []))
    merge = document["merge"]
    lifted = set(merge.get("protect", [])) if _lifted(edit, "protect") else set(edit.unprotect)
    kept = [task for task in merge.get("protect", []) if task not in lifted and (edit.tasks is None or task in tasks)]
    merge["protect"] = list(dict.fromkeys([*kept, *edit.protect]))
    evaluate["tasks"] = list(dict.fromkeys([*tasks, *edit.add_tasks, *edit.protect, *edit.weights]))
    weights = {} if _lifted(edit, "weights") else {**evaluate.get("weights", {}), **edit.weights}
    evaluate["weights"] = {task: one for task, one in weights.items() if one != 1 and task in evaluate["tasks"]}
    if not evaluate["tasks"]:
        evaluate.pop("tasks")


def _set_values(document: dict[str, Any], edit: Edit) -> None:
    for path, value in (
        (("name",), edit.name),
        (("cluster", "threshold"), edit.threshold),
        (("cluster", "signal"), edit.signal),
        (("mixture", "level"), edit.level),
        (("mixture", "router", "kind"), edit.router),
        (("mixture", "router", "preset"), edit.preset),
        (("mixture", "max_parameters"), edit.max_parameters),
        (("evaluate", "proxy_limit"), edit.proxy_items),
        (("evaluate", "held_out_limit"), edit.held_out_items),
        (("serve", "engine"), edit.engine),
        (("serve", "port"), edit.port),
    ):
        if value is None:
            continue
        section = document
        for key in path[:-1]:
            section = section.setdefault(key, {})
        section[path[-1]] = value
    for word, path in (
        ("size", ("mixture", "max_parameters")),
        ("items", ("evaluate", "proxy_limit")),
        ("items", ("evaluate", "held_out_limit")),
        ("threshold", ("cluster", "threshold")),
    ):
        if _lifted(edit, word) and getattr(edit, path[-1], None) is None:
            document.get(path[0], {}).pop(path[-1], None)


def _trimmed(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document without empty sections and lists."""
    done = {}
    for key, value in document.items():
        value = _trimmed(value) if isinstance(value, dict) else value
        if value not in ({}, []):
            done[key] = value
    return done


def _check_possible(draft: Draft, shelf: Shelf) -> None:
    """Refuse what can be known to be impossible before anything is compared: from headers alone."""
    zoo, mixture, merge = (draft.document.get(key, {}) for key in ("zoo", "mixture", "merge"))
    for name in merge.get("operators", []) if merge.get("strategy") != "none" else []:
        if OPERATORS.get(name).start == "base" and not zoo.get("base"):
            raise RecipeError(
                f"operator {name} works on task vectors, and the zoo has no base that they would start from; "
                "name zoo.base in its recipe, or use linear or slerp"
            )
    known = [one for name in draft.models if (one := _headers(shelf, name)) is not None]
    families = _families(known, draft)
    level = mixture.get("level", "model")
    if level != "model":
        _check_level(level, known)
    most = mixture.get("max_parameters")
    if most is None or not known:
        return
    least = sum(max(one.parameters for one in family) for family in families)
    if least > most and level == "model":
        each = "; ".join(f"{', '.join(m.id for m in one)}: {max(m.parameters for m in one):,}" for one in families)
        why = "cannot be merged with each other" if len(families) > 1 else "have the same shape"
        raise RecipeError(
            f"at most {most:,} parameters cannot be met with these models, which come to {least:,} even if all that "
            f"can be merged is merged ({each}{f'; these {why}' if len(families) > 1 else ''}); "
            "raise the limit, or leave some out"
        )


def _headers(shelf: Shelf, name: str) -> Description | None:
    return shelf.described(name)


def _families(models: list[Description], draft: Draft) -> list[list[Description]]:
    """Group models that nothing in their headers keeps from being merged; all apart where nothing is to be merged."""
    from composer.similarity.gate import difference

    apart = set(draft.document.get("cluster", {}).get("apart", []))
    nothing = draft.document.get("merge", {}).get("strategy") == "none"
    families: list[list[Description]] = []
    for one in models:
        for family in families:
            alone = nothing or one.id in apart or family[0].id in apart
            if not alone and difference(family[0], one) is None:
                family.append(one)
                break
        else:
            families.append([one])
    return families


def _check_level(level: str, models: list[Description]) -> None:
    from composer.similarity.gate import difference

    for one in models[1:]:
        found = difference(models[0], one, layers_only=True)
        if found is not None:
            raise RecipeError(
                f"mixing at {level} level takes models of one shape; '{models[0].id}' and '{one.id}' differ: {found}; "
                "leave one of them out, or mix at model level"
            )
