"""Tables for the terminal."""

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from composer.clustering import Cluster
from composer.evaluation.evidence import Evidence
from composer.merging.cost import SearchCost
from composer.merging.operators import Operator
from composer.merging.plan import Advice
from composer.mixture.composite import Composite
from composer.mixture.tuning import RoutingReport
from composer.outline import Outline
from composer.planning import Plan
from composer.similarity import SimilarityMatrix
from composer.zoo.checkpoint import Checkpoint, Description, Zoo

COLUMNS_AT_MOST = 4
"""Models that are described side by side; more get a line each."""

console = Console(highlight=False)
if not console.is_terminal:
    console = Console(highlight=False, width=140)  # a file or a pipe has no width of its own


def print_plan(plan: Plan, zoo: Zoo) -> None:
    """Print clusters, what will be done with each, and the cost."""
    table = Table(title="Plan", title_justify="left", show_lines=False)
    table.add_column("cluster", no_wrap=True)
    table.add_column("models")
    table.add_column("what will be done")
    for cluster, merge in zip(plan.clusters, plan.merges, strict=True):
        table.add_row(cluster.id, ", ".join(cluster.members), f"{merge.intent}\n[dim]{cluster.reason}[/dim]")
    console.print(table)
    for merge in plan.merges:
        if merge.advice is not None:
            print_advice(merge.cluster, merge.advice)
    cost = plan.cost
    size = sum(member.size_bytes for member in zoo.members) / 1e9
    console.print(
        f"reads {size:.2f} GB of weights; tries at most {cost.trials} merges in memory, writes at most "
        f"{cost.merges}, scores {cost.evaluations} models; "
        f"starts {cost.engines} or more engines"
    )
    console.print(
        f"needs about {cost.memory_gb:.1f} GB of RAM, {cost.disk_gb:.2f} GB of disk, {_duration(cost.seconds)}"
    )
    for note in plan.notes:
        console.print(Text(f"note: {note}"))


def print_outline(found: Outline) -> None:
    """Print what a run takes at most whose models are not here."""
    table = Table(title="Before anything is compared", title_justify="left")
    for key in ("model", "one shape with", "parameters", "on disk", "known from"):
        table.add_column(key, justify="right" if key in ("parameters", "on disk") else "left")
    for one in found.models:
        others = next(group for group in found.clusters if one.id in group)
        table.add_row(
            one.id,
            ", ".join(name for name in others if name != one.id) or "none",
            f"{one.parameters:,}",
            decimal(one.size_bytes),
            "the recipe" if one.declared else "its headers",
        )
    console.print(table)
    if found.unreachable:
        console.print(Text(f"note: {found.unreachable}"))
    cost = found.cost
    console.print(
        f"at most: reads {decimal(found.download_bytes)}, tries {cost.trials} merges in memory, writes {cost.merges}; "
        f"needs about {cost.memory_gb:.0f} GB of RAM, {cost.disk_gb:.0f} GB of disk for merges, and "
        f"{_duration(cost.seconds)} on an ordinary CPU"
    )


def print_advice(cluster: str, advice: Advice) -> None:
    """Print what merges of a cluster are predicted to gain."""
    title = f"{cluster}: {advice.weighed} merges weighed in {advice.seconds:.0f} s, none of them made"
    table = Table(title=title, title_justify="left")
    table.add_column("merge")
    for key in (f"gain over {advice.best}", f"{advice.level:.0%} interval", "chance", "novelty"):
        table.add_column(key, justify="right")
    for one in advice.forecasts:
        table.add_row(
            f"{one.label} of {', '.join(one.inputs)}",
            f"{one.gain:+.4f}",
            f"{one.low:+.4f} to {one.high:+.4f}",
            f"{one.chance:.2f}",
            f"{one.novelty:.0%}",
        )
    console.print(table)


def print_routing(report: RoutingReport, composite: Composite) -> None:
    """Print where prompts go, what that is worth, and which were nearest to going elsewhere."""
    names = [expert.id for expert in composite.experts]
    table = Table(title=f"where {report.prompts} prompts go", title_justify="left")
    table.add_column("prompts of")
    for name in names:
        table.add_column(name, justify="right")
    for group, counts in report.routes.items():
        table.add_row(group or "(no task)", *(str(counts.get(name, 0)) for name in names))
    table.add_row("share of all", *(f"{report.share.get(name, 0):.0%}" for name in names))
    console.print(table)
    fallback = composite.router.policy.abstain_to if composite.router else names[0]
    console.print(f"too unclear, left to {fallback}: {report.abstained:.1%}")
    console.print(f"parameters an answer takes: {report.cost:.2f} of those of always {fallback}")
    if report.value:
        worth = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in report.value.items())
        console.print(f"mean score on the proxy items: {worth}")
    console.print("nearest to the border:")
    for one in report.border:
        console.print(Text(f"  {one.confidence:.2f}  {one.expert} or {one.other}: {' '.join(one.text.split())[:90]}"))


def print_operators(operators: dict[str, Operator]) -> None:
    """Print what there is to merge with, one row each."""
    table = Table(title_justify="left")
    for key in ("operator", "models", "base", "parameters (defaults)", "what it does"):
        table.add_column(key, overflow="fold")
    for name, one in operators.items():
        values = ", ".join(f"{key} {_value(parameter.default)}" for key, parameter in one.parameters.items())
        table.add_row(name, _inputs(one), "yes" if one.start == "base" else "", values, f"{one.summary} ({one.source})")
    console.print(table)
    console.print("model-composer operators NAME says more of one")


def print_operator(name: str, operator: Operator) -> None:
    """Print one operator with its parameters."""
    console.print(f"{name}: {operator.summary} ({operator.source})")
    base = "; works on task vectors, so zoo.base must be known" if operator.start == "base" else ""
    recorded = f"; records {operator.statistics} statistics on the probe texts first" if operator.statistics else ""
    masks = "; draws random masks from merge.seed" if operator.random else ""
    stock = "" if operator.method else "; mergekit has no such operator"
    console.print(f"takes {_inputs(operator)} models{base}{masks}{recorded}{stock}")
    if not operator.parameters:
        return
    table = Table(title_justify="left")
    for key in ("parameter", "default", "may be", "searched", "one for each model", "what it is"):
        table.add_column(key, overflow="fold")
    for key, one in operator.parameters.items():
        low, high = one.low, one.high
        limits = [f"{'>' if one.open_low else '≥'} {low:g}"] if low is not None else []
        limits += [f"≤ {high:g}"] if high is not None else []
        searched = "–".join(f"{end:g}" for end in one.search) if one.search else ""
        each = "yes" if one.per_input else ""
        table.add_row(key, _value(one.default), ", ".join(limits), searched, each, one.summary)
    console.print(table)


def _inputs(operator: Operator) -> str:
    return f"{operator.least}" if operator.most == operator.least else f"{operator.least} or more"


def _value(value: float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"


def print_descriptions(models: list[Description]) -> None:
    """Print what models are, one column each, or one row each where they are many."""
    if not models:
        return
    table = Table(title_justify="left")
    rows = [_description(one) for one in models]
    if len(models) <= COLUMNS_AT_MOST:
        table.add_column("")
        for row in rows:
            table.add_column(row["model"], overflow="fold")
        for key in list(rows[0])[1:]:
            table.add_row(key, *(Text(row[key]) for row in rows))
    else:
        keys = ["model", "architecture", "parameters", "dtype", "layers", "hidden", "vocabulary", "licence"]
        for key in keys:
            table.add_column(key, overflow="fold")
        for row in rows:
            table.add_row(*(Text(row[key]) for key in keys))
    console.print(table)


def _description(one: Description) -> dict[str, str]:
    tokenizer = one.tokenizer
    kept = f"{one.dtype}, dequantised from {one.dequantised_from}" if one.dequantised_from else one.dtype
    return {
        "model": one.id,
        "architecture": one.architecture + (" (code of its own)" if one.remote_code else ""),
        "parameters": f"{one.parameters:,}",
        "dtype": f"{one.dtype}, quantised ({one.quantisation})" if one.quantisation else kept,
        "size": f"{decimal(one.size_bytes)} in {one.files} file{'s' if one.files != 1 else ''}",
        "layers": str(one.layers),
        "hidden": f"{one.hidden_size}, MLP {one.intermediate_size}",
        "heads": f"{one.heads}, {one.kv_heads} for keys and values",
        "context": f"{one.context_length:,}" if one.context_length else "?",
        "output head": "tied to the embedding" if one.tied_head else "its own",
        "vocabulary": f"{tokenizer.size:,} tokens in {one.vocabulary_size:,} rows" if one.vocabulary_size else "?",
        "tokenizer": f"tokens {tokenizer.vocabulary[:8]}, merges {tokenizer.merges[:8]}, added "
        f"{tokenizer.added_tokens[:8]}, special {tokenizer.special_tokens[:8]}",
        "chat template": tokenizer.chat_template[:8] if tokenizer.chat_template else "none",
        "settings": "\n".join(f"{key} {value}" for key, value in one.settings.items() if "num_" not in key),
        "licence": one.licence or "not stated",
        "made from": one.base_hint or "not stated",
        "content": one.content_hash[:12] if isinstance(one, Checkpoint) else "not hashed (--hash)",
        "source": one.source.path + (f" + {one.source.adapter}" if one.source.adapter else ""),
    }


def print_clusters(matrix: SimilarityMatrix, clusters: tuple[Cluster, ...], skipped: dict[str, str]) -> None:
    """Print which models belong together and why."""
    table = Table(title=f"Clusters by {matrix.signal}", title_justify="left", show_lines=True)
    table.add_column("cluster", no_wrap=True)
    table.add_column("models", overflow="fold")
    table.add_column("why", overflow="fold")
    for one in clusters:
        members = [f"{name} (representative)" if name == one.representative else name for name in one.members]
        why = [one.reason, *(f"note: {note}" for note in one.notes)]
        if one.representative not in one.members:
            why.append("represented by the zoo's base")
        table.add_row(one.id, Text("\n".join(members if len(members) > 1 else one.members)), Text("\n".join(why)))
    console.print(table)
    for name, reason in skipped.items():
        console.print(Text(f"skipped: {name}: {reason}"))
    if matrix.base:
        console.print(Text(f"task vectors start at {matrix.base}: {matrix.base_reason}"))
    if matrix.record_bytes:
        sizes = ", ".join(f"{name} {decimal(size)}" for name, size in matrix.record_bytes.items())
        console.print(Text(f"probe records: {sizes}"))
    read = f"read {decimal(matrix.read_bytes)} of weights" if matrix.read_bytes else "read no weights: all known"
    count = f"{len(clusters)} cluster{'s' if len(clusters) != 1 else ''}"
    console.print(f"{len(matrix.ids)} models in {count}; {read}")


def print_evidence(evidence: Evidence) -> None:
    """Print the composite against every model it came from, and apart from them against what needs no search."""
    tasks = [task.label for task in evidence.subjects[0].scores.tasks]
    table = Table(title="Held-out scores ± standard error", title_justify="left")
    table.add_column("model", no_wrap=True)
    for task in tasks:
        table.add_column(task.replace("_", " "), justify="right")
    table.add_column("mean", justify="right")
    table.add_column("composite minus this", justify="right")
    gaps = {one.other: one for one in evidence.differences}
    for before, subject in zip((None, *evidence.subjects), evidence.subjects, strict=False):
        if before is not None and before.real and not subject.real:
            table.add_section()
        gap = gaps.get(subject.scores.subject)
        cells = [f"{task.mean:.3f}\n±{task.standard_error:.3f}" for task in subject.scores.tasks]
        own = subject.role == "composite"
        table.add_row(
            Text(subject.scores.subject if subject.role == "source" else f"{subject.scores.subject}\n({subject.role})"),
            *cells,
            f"{subject.scores.mean:.3f}",
            f"{gap.mean:+.3f}\n[{gap.low:+.3f}, {gap.high:+.3f}]".replace("[", r"\[") if gap and not own else "",
            style="bold" if own else None if subject.real else "dim",
        )
    if evidence.by_task:
        table.add_section()
        each = [f"{one.mean:+.3f}\n[{one.low:+.3f}, {one.high:+.3f}]".replace("[", r"\[") for one in evidence.by_task]
        table.add_row(Text(f"composite minus\n{evidence.best_single}"), *each, "", "")
    console.print(table)
    console.print(Text(evidence.verdict))


def print_cost(cost: SearchCost, seconds: dict[str, float], scoring: dict[str, float]) -> None:
    """Print what a run's search took, and its stages."""
    table = Table(title="What the search cost", title_justify="left")
    rows = {
        "merges tried": f"{cost.tried}",
        "failed": f"{cost.failed}",
        "kept": f"{cost.kept}",
        "proxy items scored": f"{cost.items:,}",
        "models scored besides": f"{cost.models}",
        "merging": f"{cost.merge_seconds:.1f} s",
        "scoring": f"{cost.score_seconds:.1f} s",
        "written": decimal(cost.written_bytes),
    }
    for key in rows:
        table.add_column(key, justify="right")
    table.add_row(*rows.values())
    console.print(table)
    taken = {**seconds, **{f"scoring {what}": value for what, value in scoring.items()}}
    console.print("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in taken.items()))


def _duration(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
