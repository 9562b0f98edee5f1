"""Tables for the terminal."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from composer.evaluation.evidence import Evidence
from composer.planning import Plan
from composer.zoo.checkpoint import Zoo

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
    cost = plan.cost
    size = sum(member.size_bytes for member in zoo.members) / 1e9
    console.print(
        f"reads {size:.2f} GB of weights; makes at most {cost.merges} merges and {cost.evaluations} proxy scores; "
        f"starts {cost.engines} or more engines"
    )
    console.print(
        f"needs about {cost.memory_gb:.1f} GB of RAM, {cost.disk_gb:.2f} GB of disk, {_duration(cost.seconds)}"
    )


def print_evidence(evidence: Evidence) -> None:
    """Print the composite against every model it came from."""
    tasks = [task.task for task in evidence.subjects[0].scores.tasks]
    table = Table(title="Held-out scores ± standard error", title_justify="left")
    table.add_column("model", no_wrap=True)
    for task in tasks:
        table.add_column(task.replace("_", " "), justify="right")
    table.add_column("mean", justify="right")
    table.add_column("composite minus this", justify="right")
    gaps = {one.other: one for one in evidence.differences}
    for subject in evidence.subjects:
        gap = gaps.get(subject.scores.subject)
        cells = [f"{task.mean:.3f}\n±{task.standard_error:.3f}" for task in subject.scores.tasks]
        own = subject.role == "composite"
        table.add_row(
            Text(subject.scores.subject if subject.role == "source" else f"{subject.scores.subject}\n({subject.role})"),
            *cells,
            f"{subject.scores.mean:.3f}",
            f"{gap.mean:+.3f}\n[{gap.low:+.3f}, {gap.high:+.3f}]".replace("[", r"\[") if gap and not own else "",
            style="bold" if own else None,
        )
    console.print(table)
    console.print(evidence.verdict)


def _duration(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
