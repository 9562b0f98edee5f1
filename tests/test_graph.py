"""The compose graph: its shape, and how other servers find it."""

import itertools
import json
from importlib import import_module

from tests.conftest import ROOT


def test_langgraph_json_names_a_compiled_graph_without_a_checkpointer() -> None:
    settings = json.loads((ROOT / "langgraph.json").read_text())
    for target in settings["graphs"].values():
        file, _, name = target.partition(":")
        module = import_module(file.removeprefix("./").removesuffix(".py").replace("/", "."))
        graph = getattr(module, name)
        assert graph.checkpointer is None
        wanted = {"compose": {"run_path", "yes"}, "chat": {"root", "zoo", "yes"}}[graph.name]
        assert graph.get_context_jsonschema()["properties"].keys() >= wanted


def test_the_stages_follow_each_other() -> None:
    from graphs.compose import graph

    edges = {(edge.source, edge.target) for edge in graph.get_graph().edges}
    order = [
        "inspect",
        "compare",
        "cluster",
        "plan",
        "approve",
        "prepare",
        "merge",
        "mix",
        "serve",
        "evaluate",
        "report",
    ]
    assert {("__start__", "inspect"), ("report", "__end__")} <= edges
    assert set(itertools.pairwise(order)) <= edges
    assert len(edges) == len(order) + 1
