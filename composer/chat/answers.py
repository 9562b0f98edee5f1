"""What is said: plans, results and reasons in words, as plain text that any door can show."""

from collections.abc import Sequence

from rich.filesize import decimal

from composer.chat.draft import Draft
from composer.chat.shelf import Shelf
from composer.errors import ZooError
from composer.evaluation.evidence import Evidence
from composer.evaluation.statistics import paired_gain
from composer.merging.plan import MergeOutcome
from composer.mixture.composite import Composite
from composer.planning import Plan
from composer.runs import Run
from composer.zoo.checkpoint import Zoo

HELP = """\
Say what you want in plain words; nothing is made before you have seen the plan and said yes. For example:
  merge math and law                     leave out scrambled, keep play whole
  merge everything under 200M parameters     make sure gsm8k does not drop
  use ties, or dare-ties                 with evolution, 40 trials
  mix code and play at ffn level         with a fast linear router
  evaluate on math and law, 50 items     in less than 10 minutes and 8 GB of RAM
  serve it on port 9000                  call it parrot
  what would it cost with all of them?   plan, run, cancel, status
  list, inspect math, compare math and law     why was scrambled left out?   evidence
  which expert would answer "…"?         undo, roll back, start over, save as mine.yaml"""


def plural(count: int, noun: str) -> str:
    """Return a count with its noun."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def draft_in_words(draft: Draft) -> str:
    """Return in two or three lines what a draft says."""
    document = draft.document
    merge, mixture, cluster = (document.get(key, {}) for key in ("merge", "mixture", "cluster"))
    strategy = merge.get("strategy", "simmerge")
    how = "nothing is merged" if strategy == "none" else f"merged by {strategy}"
    if merge.get("operators") and strategy != "none":
        how += f" with {' or '.join(merge['operators'])}"
    said = [f"{document['name']}: {plural(len(draft.models), 'model')} ({', '.join(draft.models)}), {how}"]
    said += [f"{', '.join(cluster['apart'])} kept whole"] if cluster.get("apart") else []
    said += [f"mixed at {mixture['level']} level"] if mixture.get("level") else []
    router = mixture.get("router", {})
    said += [f"router {' '.join(filter(None, (router.get('preset'), router.get('kind'))))}"] if router else []
    said += [f"at most {mixture['max_parameters']:,} parameters"] if mixture.get("max_parameters") else []
    said += [f"no merge may lose on {', '.join(merge['protect'])}"] if merge.get("protect") else []
    weights = document.get("evaluate", {}).get("weights", {})
    said += [", ".join(f"{task} counts {weight:g} times" for task, weight in weights.items())] if weights else []
    said += ["every merge kept"] if merge.get("accept") == "always" else []
    limits = draft.limits
    said += [f"at most {limits.minutes:g} minutes"] if limits.minutes is not None else []
    said += [f"at most {limits.memory_gb:g} GB of RAM"] if limits.memory_gb is not None else []
    said += [f"at most {limits.disk_gb:g} GB of disk"] if limits.disk_gb is not None else []
    said += [f"judged by {', '.join(draft.tasks)}"] if draft.tasks else []
    serve = document.get("serve", {})
    where = f" on port {serve['port']}" if serve.get("port") else ""
    said += [f"served{where} afterwards"] if draft.serve else []
    return "; ".join(said) + "."


def plan_in_words(plan: Plan, zoo: Zoo, run: Run | None, draft: Draft, front: str = "") -> str:
    """Return what a plan will read, write, start and take.

    Args:
        plan: The plan.
        zoo: Its models.
        run: Where it will be carried out; None if it is only supposed.
        draft: What was wished for.
        front: The address that the composite will answer at, if not the recipe's.
    """
    cost, recipe = plan.cost, draft.recipe
    lines = ["Plan:"]
    for cluster, merge in zip(plan.clusters, plan.merges, strict=True):
        lines.append(f"  {cluster.id} ({', '.join(cluster.members)}): {merge.intent}")
    size = sum(member.size_bytes for member in zoo.members)
    places = sorted({member.source.path for member in zoo.members})
    lines.append(f"  reads    {decimal(size)} of weights in {plural(len(places), 'place')}: {_few(places)}")
    written = f"at most {plural(cost.merges, 'merge')}, {cost.disk_gb:.2f} GB"
    lines.append(f"  writes   {written}, into {run.path if run else 'the runs directory'} and the store beside it")
    lines.append("  downloads nothing")
    lines.append(
        f"  tries    at most {plural(cost.trials, 'merge')} in memory; scores {plural(cost.evaluations, 'model')} too"
    )
    after = "stays up afterwards" if draft.serve else "down again after the evaluation"
    where = f"behind {front}" if front else f"on {recipe.serve.host}:{recipe.serve.port}"
    lines.append(f"  starts   {plural(cost.engines, 'engine')} or more, {where}; {after}")
    lines.append(f"  takes    about {_minutes(cost.seconds)} and {cost.memory_gb:.1f} GB of RAM (estimates)")
    lines += [f"  note: {note}" for note in plan.notes]
    return "\n".join(lines)


def _minutes(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _few(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def result_in_words(run: Run, evidence: Evidence, composite: Composite, protected: Sequence[str]) -> str:
    """Return what a run found: the verdict, the experts, and how protected tasks came out."""
    lines = [evidence.verdict]
    lines += [f"  expert {expert.id}: {expert.reason}" for expert in composite.experts]
    lines += [f"  left out {name}: {reason}" for name, reason in composite.left_out.items()]
    mine = evidence.subjects[0].scores
    sources = [one.scores for one in evidence.subjects if one.role == "source"]
    for task in protected:
        best = max(sources, key=lambda one: one.task(task).mean)
        own, other = mine.task(task).mean, best.task(task).mean
        noise = not paired_gain(mine.on(task), best.on(task)).behind(2)
        word = "did not drop" if own >= other else "is lower, within noise" if noise else "dropped"
        lines.append(f"  {task} {word}: {own:.3f} held out, against {other:.3f} of {best.subject}, the best on it")
    lines.append(f"  report: {run.path / 'report.html'}")
    return "\n".join(lines)


def evidence_in_words(evidence: Evidence) -> str:
    """Return the table of held-out means, and the verdict."""
    width = max(len(one.scores.subject) for one in evidence.subjects)
    gaps = {one.other: f"  {one.mean:+.3f} [{one.low:+.3f}, {one.high:+.3f}]" for one in evidence.differences}
    rows = [
        f"  {one.scores.subject:{width}}  {one.role:9}  {one.scores.mean:.3f}{gaps.get(one.scores.subject, '')}"
        for one in evidence.subjects
    ]
    return "\n".join(["Held-out means (and composite minus each):", *rows, evidence.verdict])


def shelf_in_words(shelf: Shelf, draft: Draft) -> str:
    """Return the models and tasks there are."""
    lines = []
    for name in shelf.models:
        mark = "" if name in draft.models else "  (left out)"
        lines.append(f"  {_model(shelf, name)}{mark}")
    tasks = ", ".join(shelf.tasks) or "none; name some of lm-eval's, e.g. 'evaluate on arc_easy'"
    return "\n".join([f"{plural(len(lines), 'model')} from {shelf.path}:", *lines, f"tasks: {tasks}"])


def _model(shelf: Shelf, name: str) -> str:
    try:
        one = shelf.described(name)
    except ZooError as error:
        return f"{name}: {error}"
    if one is None:
        return f"{name}: {shelf.entry(name)['model']}, not here yet"
    return f"{name}: {one.parameters:,} parameters, {one.architecture}, {one.dtype}, licence {_quoted(one.licence)}"


def model_in_words(shelf: Shelf, name: str) -> str:
    """Return what a model's headers say."""
    try:
        one = shelf.described(name)
    except ZooError as error:
        return f"{name}: {error}"
    if one is None:
        return f"{name}: {shelf.entry(name)['model']}, not here yet; a plan asks before it is downloaded"
    examples = plural(len(shelf.entry(name).get("examples", [])), "example request")
    return (
        f"{_model(shelf, name)}; {one.layers} layers of {one.hidden_size}, {decimal(one.size_bytes)}, "
        f"context {one.context_length}, {one.tokenizer.size:,} tokens, {examples}"
    )


def _quoted(text: str | None) -> str:
    """Return what a model card says as data: one line, short."""
    return " ".join("".join(one if one.isprintable() else " " for one in text).split())[:60] if text else "not stated"


def reason_in_words(name: str | None, composite: Composite, outcomes: Sequence[MergeOutcome]) -> str:
    """Return why a model is in the composite or not: what was decided, and by which trial."""
    if name is None:
        lines = [f"{expert.id}: {expert.reason}" for expert in composite.experts]
        return "\n".join(lines + [f"{one} was left out: {why}" for one, why in composite.left_out.items()])
    lines = []
    for expert in composite.experts:
        if name in (expert.id, *expert.members):
            lines.append(f"{name} is in expert {expert.id}: {expert.reason}")
    if name in composite.left_out:
        lines.append(f"{name} was left out: {composite.left_out[name]}")
    for trial in (trial for one in outcomes for trial in one.trials if name in trial.step.inputs):
        verdict = "kept" if trial.accepted else "not kept"
        lines.append(f"  {trial.step.operator}({', '.join(trial.step.inputs)}): {trial.reason}; {verdict}")
    return "\n".join(lines) or f"{name} is not in the recipe of {composite.name}: it was left out by request"
