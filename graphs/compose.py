"""The compose graph: from a recipe to a served, measured composite.

    inspect -> compare -> cluster -> plan -> approve -> prepare -> merge (one branch per cluster) -> mix -> serve
            -> evaluate -> report

Every node writes its result to a file in the run directory and puts the path into the state, so a killed run
carries on at the first stage that had not finished.
"""

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from langgraph.config import get_stream_writer
from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime
from langgraph.types import Send, interrupt

from composer.artefacts import digest
from composer.clustering import Clusters, cluster, joins
from composer.errors import CancelledError, NotApprovedError
from composer.evaluation import Evidence, Subject, weigh_evidence
from composer.evaluation.baselines import without_a_router
from composer.evaluation.evidence import Role
from composer.evaluation.scorer import choose
from composer.evaluation.served import score_endpoint
from composer.merging.averages import uniform_averages
from composer.merging.cost import SearchCost
from composer.merging.merge import merge_cluster
from composer.merging.plan import MergeOutcome
from composer.merging.trials import TrialLog
from composer.merging.workbench import Workbench
from composer.mixture import Composite, build_composite, choose_experts
from composer.planning import Plan, make_plan
from composer.probes import load_texts
from composer.progress import Progress, Step
from composer.report import RunRecord, write_report
from composer.serving.server import Endpoint
from composer.serving.vitals import Vitals
from composer.similarity import SimilarityMatrix, compare
from composer.zoo import Checkpoint, Zoo, inspect_zoo, make_whole
from graphs.state import BranchState, ComposeContext, ComposeState, Session

VITALS = "vitals.json"
"""What serving takes, in the run directory."""


@contextmanager
def stage(name: str, runtime: Runtime[ComposeContext], **details: str) -> Iterator[Progress]:
    """Log a stage's start, end and duration, and yield what it reports progress to."""
    session = runtime.context.session
    write, log = get_stream_writer(), session.run.log

    def progress(step: Step) -> None:
        if session.stopping.is_set():
            raise CancelledError(f"{session.run.name} was stopped in '{name}'; run it again to carry on from there")
        write(step.model_dump())

    log(name, "started", **details)
    began = time.monotonic()
    progress(Step(stage=name, message="started"))
    yield progress
    log(name, "finished", seconds=round(time.monotonic() - began, 3), **details)
    progress(Step(stage=name, message="finished"))


def inspect(state: ComposeState, runtime: Runtime[ComposeContext]) -> dict[str, Any]:
    """Describe all models."""
    session = runtime.context.session
    with stage("inspect", runtime) as progress:
        session.split("proxy")  # what is wrong with a task is told before any weights are read
        zoo = inspect_zoo(session.run.recipe.zoo, session.run.store, progress)
        return {"zoo": _save(session, "zoo.json", zoo)}


def compare_models(state: ComposeState, runtime: Runtime[ComposeContext]) -> dict[str, Any]:
    """Measure the similarity of all pairs."""
    session = runtime.context.session
    recipe = session.run.recipe
    with stage("compare", runtime) as progress:
        zoo = Zoo.load(state["zoo"])
        skip = recipe.zoo.on_error == "skip"
        matrix = compare(zoo, session.run.store, recipe.cluster, recipe.probes, skip_broken=skip, progress=progress)
        done = {"similarity": _save(session, "similarity.json", matrix)}
        if matrix.skipped:
            done["zoo"] = _save(session, "zoo-sound.json", zoo.without(matrix.skipped))
        return done


def cluster_models(state: ComposeState, runtime: Runtime[ComposeContext]) -> dict[str, Any]:
    """Group what may be merged."""
    session = runtime.context.session
    with stage("cluster", runtime):
        matrix = SimilarityMatrix.load(state["similarity"])
        clusters = Clusters(clusters=cluster(matrix, session.run.recipe.cluster))
        return {"clusters": _save(session, "clusters.json", clusters)}


def plan(state: ComposeState, runtime: Runtime[ComposeContext]) -> dict[str, Any]:
    """Plan the merges and price the run."""
    session = runtime.context.session
    with stage("plan", runtime) as progress:
        progress(Step(stage="plan", message="loading tasks"))
        zoo = Zoo.load(state["zoo"])
        planned = make_plan(
            session.run.recipe,
            zoo,
            Clusters.load(state["clusters"]).clusters,
            proxy_items=session.split("proxy").size,
            held_out_items=session.split("held_out").size,
            advise=session.advisor(zoo, progress).advise,
        )
        return {"plan": _save(session, "plan.json", planned)}


def approve(state: ComposeState, runtime: Runtime[ComposeContext]) -> dict[str, Any]:
    """Wait for a yes. Stands alone, since an interrupted node runs again from its top.

    Raises:
        NotApprovedError: if the answer is no; asked again on the next run.
    """
    if not runtime.context.yes and not interrupt({"plan": state["plan"]}):
        raise NotApprovedError("the plan was not approved; nothing was made")
    runtime.context.session.run.log("approve", "finished")
    return {"approved": True}


def prepare(state: ComposeState, runtime: Runtime[ComposeContext]) -> dict[str, Any]:
    """Fold in adapters and dequantise GGUF files, for everything after this works on directories."""
    session = runtime.context.session
    with stage("prepare", runtime) as progress:
        zoo = Zoo.load(state["zoo"])
        for checkpoint in [*zoo.members, *([zoo.base] if zoo.base else [])]:
            make_whole(checkpoint, session.run.store, progress)
        return {}


def branches(state: ComposeState) -> list[Send]:
    """Send one branch per cluster."""
    planned = Plan.load(state["plan"])
    return [
        Send("merge", BranchState(cluster=merge.cluster, plan=state["plan"], zoo=state["zoo"]))
        for merge in planned.merges
    ]


def merge(state: BranchState, runtime: Runtime[ComposeContext]) -> dict[str, Any]:
    """Carry out the plan of one cluster."""
    session = runtime.context.session
    with session.one_at_a_time, stage("merge", runtime, cluster=state["cluster"]) as progress:
        mine = next(one for one in Plan.load(state["plan"]).merges if one.cluster == state["cluster"])
        split, probes = session.split("proxy"), session.run.recipe.probes
        with closing(TrialLog(session.run.store.root / "trials.sqlite")) as log:
            zoo = Zoo.load(state["zoo"])
            models = [*(zoo[name] for name in mine.members), *([zoo.base] if zoo.base else [])]
            workbench = Workbench(
                zoo=zoo,
                cluster=mine.cluster,
                section=session.run.recipe.merge,
                executor=session.executor,
                log=log,
                proxy={items.name: items.hashes for items in split.tasks},
                fingerprint=split.fingerprint,
                texts=digest(load_texts(probes.texts, probes.limit, probes.characters)),
                scorer=choose(session.run.recipe.evaluate, models) if len(mine.members) > 1 else "torch",
                weights=session.run.recipe.evaluate.weights,
                advise=session.advisor(zoo, progress).advise,
                memory=session.run.store.root,
                progress=progress,
            )
            outcome = merge_cluster(mine, workbench)
        return {"outcomes": [_save(session, f"outcome-{outcome.cluster}.json", outcome)]}


def mix(state: ComposeState, runtime: Runtime[ComposeContext]) -> dict[str, Any]:
    """Build the composite from merged models and loners."""
    session = runtime.context.session
    with stage("mix", runtime) as progress:
        progress(Step(stage="mix", message="choosing experts and building the router"))
        session.rest()  # the model that merges were tried in
        recipe = session.run.recipe
        outcomes = sorted(map(MergeOutcome.load, state["outcomes"]), key=lambda one: one.cluster)
        experts, left_out = choose_experts(
            Zoo.load(state["zoo"]), outcomes, session.score, recipe.mixture.max_parameters, recipe.merge.protect
        )
        directory = build_composite(recipe.name, experts, left_out, recipe.mixture, session.run.store, session.known)
        session.run.link_composite(directory)
        return {"composite": str(directory)}


def serve(state: ComposeState, runtime: Runtime[ComposeContext]) -> dict[str, Any]:
    """Bring the composite up behind its endpoint."""
    session = runtime.context.session
    with stage("serve", runtime) as progress:
        endpoint = session.serving(state["composite"], progress).endpoint
        return {"endpoint": _save(session, "endpoint.json", endpoint)}


def evaluate(state: ComposeState, runtime: Runtime[ComposeContext]) -> dict[str, Any]:
    """Score the composite through the endpoint, and all it is compared with, on the held-out items."""
    session = runtime.context.session
    with stage("evaluate", runtime) as progress:
        # After a kill the endpoint of the serve stage is gone; it is brought up again here.
        server = session.serving(state["composite"], progress)
        endpoint = server.endpoint
        recipe, split = session.run.recipe, session.split("held_out")
        served = score_endpoint(
            endpoint,
            Path(state["composite"]),
            split,
            session.run.store,
            serving=recipe.serve,
            batch_size=recipe.evaluate.batch_size,
            progress=progress,
        )
        progress(Step(stage="evaluate", message="latency and memory"))
        vitals = server.vitals()
        if vitals is not None:
            _save(session, VITALS, vitals)
        if not runtime.context.keep_serving:
            session.close()
        session.run.log("evaluate", "scored", what="the composite through the endpoint", seconds=served.seconds)
        began = time.monotonic()
        baselines, notes = _baselines(state, session, progress)
        seconds = round(time.monotonic() - began, 3)
        session.run.log("evaluate", "scored", what="what it is compared with", seconds=seconds)
        evidence = weigh_evidence(
            served.scores.weighted(recipe.evaluate.weights),
            baselines,
            notes=notes,
            routing=served.routing,
            likelihoods="endpoint" if endpoint.scores_prompts else "in process",
            seed=recipe.evaluate.seed,
        )
        return {"evidence": _save(session, "evidence.json", evidence)}


def report(state: ComposeState, runtime: Runtime[ComposeContext]) -> dict[str, Any]:
    """Write the report."""
    session = runtime.context.session
    with stage("report", runtime):
        outcomes = sorted(map(MergeOutcome.load, state["outcomes"]), key=lambda one: one.cluster)
        matrix = SimilarityMatrix.load(state["similarity"])
        record = RunRecord(
            run=session.run.name,
            recipe=session.run.recipe.model_dump(mode="json"),
            zoo=Zoo.load(state["zoo"]),
            similarity=matrix,
            joins=joins(matrix, session.run.recipe.cluster),
            plan=Plan.load(state["plan"]),
            outcomes=tuple(outcomes),
            composite=Composite.open(Path(state["composite"])),
            endpoint=Endpoint.load(state["endpoint"]),
            evidence=Evidence.load(state["evidence"]),
            seconds=_durations(session),
            cost=SearchCost.total(outcome.cost for outcome in outcomes),
            scoring=_scoring(session),
            vitals=_vitals(session),
        )
        return {"report": str(write_report(record, session.run.path))}


def _baselines(state: ComposeState, session: Session, progress: Progress) -> tuple[list[Subject], tuple[str, ...]]:
    """Score every source model, merged expert and the base on the held-out items, and what needs no search."""
    zoo, composite = Zoo.load(state["zoo"]), Composite.open(Path(state["composite"]))
    rows: list[tuple[Checkpoint, Role]] = [(member, "source") for member in zoo.members]
    if composite.gates is None:  # else the only expert is the composite itself
        rows += [(expert.checkpoint, "merged") for expert in composite.experts if expert.checkpoint.lineage]
    if zoo.base is not None and zoo.base.id not in zoo.ids:
        rows.append((zoo.base, "base"))
    subjects = []
    calls = [(checkpoint, "held_out") for checkpoint, _ in rows]
    progress(Step(stage="evaluate", message="baselines", done=0, total=len(rows)))
    for (checkpoint, role), scores in zip(rows, session.executor.map("score", calls), strict=True):
        subjects.append(Subject(role=role, scores=scores))
        progress(Step(stage="evaluate", message=f"baseline {checkpoint.id}", done=len(subjects), total=len(rows)))
    experts = {expert.id for expert in composite.experts}
    own = {one.scores.subject: one.scores for one in subjects if one.scores.subject in experts}
    progress(Step(stage="evaluate", message="uniform averages"))
    averages, notes = uniform_averages(
        Plan.load(state["plan"]).clusters,
        [one for one in map(MergeOutcome.load, state["outcomes"]) if one.result and one.result.id in own],
        zoo,
        session.run.recipe.merge,
        session.executor,
    )
    subjects += [Subject(role="average", scores=scores) for scores in averages]
    return subjects + without_a_router(list(own.values())), notes


def _save(session: Session, name: str, value: Any) -> str:
    return str(value.save(session.run.path / name))


def _vitals(session: Session) -> Vitals | None:
    path = session.run.path / VITALS
    return Vitals.load(path) if path.is_file() else None


def _scoring(session: Session) -> dict[str, float]:
    """Return the seconds that scoring held-out items took, by what was scored; of several attempts the last."""
    return {event["what"]: event["seconds"] for event in session.run.events() if event["event"] == "scored"}


def _durations(session: Session) -> dict[str, float]:
    """Return the seconds each finished stage took, summed over branches."""
    seconds: dict[str, float] = {}
    for event in session.run.events():
        if event["event"] == "finished":
            seconds[event["stage"]] = seconds.get(event["stage"], 0.0) + event.get("seconds", 0.0)
    return seconds


def build() -> StateGraph[ComposeState, ComposeContext]:
    """Return the graph, not yet compiled."""
    graph = StateGraph(ComposeState, context_schema=ComposeContext)
    graph.add_node("inspect", inspect)
    graph.add_node("compare", compare_models)
    graph.add_node("cluster", cluster_models)
    graph.add_node("plan", plan)
    graph.add_node("approve", approve)
    graph.add_node("prepare", prepare)
    graph.add_node("merge", merge)
    graph.add_node("mix", mix)
    graph.add_node("serve", serve)
    graph.add_node("evaluate", evaluate)
    graph.add_node("report", report)
    graph.add_edge(START, "inspect")
    graph.add_edge("inspect", "compare")
    graph.add_edge("compare", "cluster")
    graph.add_edge("cluster", "plan")
    graph.add_edge("plan", "approve")
    graph.add_edge("approve", "prepare")
    graph.add_conditional_edges("prepare", branches, ["merge"])
    graph.add_edge("merge", "mix")
    graph.add_edge("mix", "serve")
    graph.add_edge("serve", "evaluate")
    graph.add_edge("evaluate", "report")
    graph.add_edge("report", END)
    return graph


graph = build().compile(name="compose")
"""Without a checkpointer: servers such as LangGraph's bring their own."""
