"""Requests in plain words: how many become the recipe they should, are asked back, or are refused."""

from copy import deepcopy
from typing import Any

import pytest
from ruamel.yaml import YAML

from composer.artefacts import Store
from composer.chat.builtin import BuiltIn
from composer.chat.calls import DraftRecipe, Question, Understood
from composer.chat.draft import Draft, begun, changed
from composer.chat.shelf import Shelf, open_shelf
from composer.recipe import override
from tests.conftest import ROOT

SETS = {
    "chat_requests.yaml": {"right": 0.9, "asks": 0.9, "refuses": 1.0},
    "chat_requests_held_out.yaml": {"right": 0.7, "asks": 0.9, "refuses": 1.0},
    "chat_requests_fresh.yaml": {"right": 0.5, "asks": 0.9, "refuses": 1.0},
    "chat_requests_unseen.yaml": {"right": 0.9, "asks": 0.9, "refuses": 1.0},
}
"""The least rates of a set: right recipes (or tools), ambiguous ones asked back, impossible ones refused or asked. The
held-out set's are what was measured, to notice when they fall; they are no goal."""


def requests(file: str) -> list[dict[str, Any]]:
    return YAML(typ="safe").load((ROOT / "tests" / file).read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return open_shelf(ROOT / "recipes" / "quickstart.yaml", Store(tmp_path_factory.mktemp("store")))


def conversation(says: list[str], shelf: Shelf) -> tuple[Draft, Understood]:
    """Carry on a conversation as the graph does, up to the draft."""
    drafts, question = [begun(shelf)], None
    understood = Understood()
    for said in says:
        understood = BuiltIn().understand(said, drafts[-1], shelf, question)
        question = understood.question
        for call in understood.calls:
            if isinstance(call, DraftRecipe):
                drafts.append(changed(drafts[-1], call.edit, shelf, said))
            elif call.tool == "undo":
                drafts = drafts[:-1] or [begun(shelf)]
    return drafts[-1], understood


def wrong(request: dict[str, Any], shelf: Shelf) -> str | None:
    """Return what is not as it should be, or None."""
    says = request["say"] if isinstance(request["say"], list) else [request["say"]]
    draft, understood = conversation(says, shelf)
    asked: Question | None = understood.question
    answer = (asked.text if asked else understood.refusal) or ""
    if request.get("asks") or request.get("refuses"):
        if request.get("asks") and not asked:
            return f"did not ask: {understood.calls or understood.refusal}"
        if not answer:
            return f"neither asked nor refused: {understood.calls}"
        return next(
            (f"'{word}' is not in: {answer}" for word in request.get("mentions", ()) if word not in answer), None
        )
    if answer:
        return answer
    if request.get("tool") and request["tool"] not in [call.tool for call in understood.calls]:
        return f"called {understood.calls}"
    settings = [f"{key}={YAML_VALUE(value)}" for key, value in request.get("recipe", {}).items()]
    wanted = override(begun(shelf).recipe, settings).model_dump(mode="json")
    if "models" in request:
        wanted["zoo"]["models"] = [one for one in wanted["zoo"]["models"] if one["id"] in request["models"]]
        assert len(wanted["zoo"]["models"]) == len(request["models"])
    got = draft.recipe.model_dump(mode="json")
    if got != wanted:
        differ = [(key, got[key], wanted[key]) for key in got if got[key] != wanted[key] and key != "zoo"]
        return f"{differ} {draft.models}"
    if draft.serve != request.get("serve", False):
        return f"serve is {draft.serve}"
    limits = {key: value for key, value in draft.limits.model_dump().items() if value is not None}
    return None if limits == request.get("limits", {}) else f"limits {limits}"


def YAML_VALUE(value: Any) -> str:  # noqa: N802 - a constant conversion
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)


@pytest.mark.parametrize("file", SETS)
def test_requests_become_what_they_should(file: str, shelf: Shelf, capsys: pytest.CaptureFixture[str]) -> None:
    results: dict[str, list[bool]] = {}
    before = deepcopy(shelf.document)
    report = []
    for request in requests(file):
        group = "asks" if request.get("asks") else "refuses" if request.get("refuses") else "right"
        found = wrong(request, shelf)
        results.setdefault(group, []).append(found is None)
        if found is not None:
            report.append(f"  {request['kind']}: {request['say']}\n    {found}")
    assert shelf.document == before, "a request changes its draft, never what it began with"
    rates = {group: sum(each) / len(each) for group, each in results.items()}
    with capsys.disabled():
        words = {"right": "right recipe", "asks": "ambiguous, asked back", "refuses": "impossible, refused or asked"}
        told = ", ".join(f"{words[group]} {sum(each)}/{len(each)}" for group, each in results.items())
        print(f"\n{file}: {told}")
        print("\n".join(report))
    for group, least in SETS[file].items():
        assert rates[group] >= least, (group, report)
