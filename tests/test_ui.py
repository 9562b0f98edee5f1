"""The page: a real server, a real browser, a real run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from composer.artefacts import Store
from composer.chat.draft import begun
from composer.chat.rewrite import KEPT, rewritten
from composer.chat.saving import as_yaml
from composer.chat.shelf import open_shelf
from composer.errors import RecipeError
from composer.recipe import Recipe
from composer.runs import AGAIN, Run
from tests.conftest import MODELS, QUICKSTART, ROOT, Cli, children, survivors, take_signals

pytest.importorskip("nicegui")
playwright = pytest.importorskip("playwright.sync_api")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_a_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")
MARKUP = "<img src=x onerror=document.title='broken'>"
RECIPE = """\
name: tiny
zoo:
  models:
    - {{id: math, model: "{zoo}/stories-math", examples: ["Tom has 3 apples.", "How many cars?"]}}
    - {{id: law, model: "{zoo}/stories-law", examples: ["The officer found a bag.", "The judge said"]}}
    - {{id: code, model: "{zoo}/script-code", examples: ["def slope(x1,y1):", "Write a function"]}}
merge: {{strategy: average, accept: always}}
serve: {{engine: transformers, port: 0}}
evaluate: {{include: {tasks}, tasks: [quick_math, quick_law], proxy_limit: 12, held_out_limit: 12, batch_size: 48}}
"""


@dataclass
class Served:
    """A page's server in a process of its own."""

    url: str
    runs: Path
    home: Path
    process: "subprocess.Popen[str]"


def start(home: Path) -> Served:
    """Start `model-composer ui` about a zoo whose folder and cards are full of markup."""
    if not (home / "tiny.yaml").is_file():
        zoo = home / "<b>zoo"
        for name in ("stories-math", "stories-law", "script-code"):
            shutil.copytree(MODELS / name, zoo / name)
            (zoo / name / "README.md").write_text(f'---\nlicense: "{MARKUP}\u202e"\n---\n')
        (home / "tiny.yaml").write_text(RECIPE.format(zoo=zoo, tasks=QUICKSTART / "tasks"))
    process = subprocess.Popen(
        [sys.executable, "-m", "composer.cli", "ui", "--zoo", "tiny.yaml", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=home,
        env={**os.environ, "MODEL_COMPOSER_RUNS": str(home / "runs"), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        preexec_fn=take_signals,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:\d+/", line)
    assert found, line + process.stdout.read()
    for _ in range(100):
        try:
            httpx.get(found[0])
            break
        except httpx.ConnectError:
            time.sleep(0.1)
    return Served(found[0], home / "runs", home, process)


def stop(served: Served) -> int:
    """Press Ctrl-C and return the exit code; nothing may be left behind."""
    below = children(served.process.pid)
    served.process.send_signal(signal.SIGINT)
    code = served.process.wait(60)
    assert not survivors(below)
    return code


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    one = start(tmp_path_factory.mktemp("ui"))
    yield one
    if one.process.poll() is None:
        stop(one)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(chromium: Any, served: Served, width: int = 1280) -> Any:
    """Open the page; what it asks of other hosts, and what breaks in it, is kept on the page object."""
    page = chromium.new_context(viewport={"width": width, "height": 844}).new_page()
    page.foreign, page.broken = [], []
    own = served.url.removeprefix("http://").rstrip("/")
    page.on("request", lambda one: None if own in one.url or one.url[:5] == "data:" else page.foreign.append(one.url))
    page.on("pageerror", lambda error: page.broken.append(str(error)))
    page.goto(served.url)
    page.get_by_placeholder("Say what you want").wait_for()
    return page


def part(page: Any, name: str) -> Any:
    return page.locator(f'[data-part="{name}"]')


def say(page: Any, message: str) -> None:
    page.get_by_placeholder("Say what you want").fill(message)
    page.keyboard.press("Enter")


def tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def settled(page: Any) -> None:
    """Wait until nothing is being done."""
    page.wait_for_function(
        "!/thinking|:/.test(document.querySelector('[data-part=state]').innerText.replace(/https?:/, ''))",
        timeout=120_000,
    )


# --- without a browser


def test_a_recipe_edited_by_hand_reaches_no_further_than_the_shelf(tmp_path: Path) -> None:
    shelf = open_shelf(ROOT / "recipes" / "quickstart.yaml", Store(tmp_path / "store"))
    draft = begun(shelf)
    text = as_yaml(draft)
    assert rewritten(draft, text, shelf).recipe == draft.recipe
    assert rewritten(draft, text.replace("name: quickstart", "name: mine"), shelf).recipe.name == "mine"
    for old, new, wrong in (
        ("models/stories-law", "models/stories-web", "zoo.models.stories-law: a conversation keeps"),
        ("id: stories-law", "id: other", "there is no model 'other'"),
        ("include: ", "sandbox: true\n  include: ", "evaluate.sandbox"),
        ("serve:", "serve:\n  host: 0.0.0.0", "serve.host"),
        ("strategy: average", "strategy: averge", r"line \d+: merge.strategy: .*did you mean 'average'"),
        ("quick_math", "quick_mth", "did you mean 'quick_math'"),
        ("name: quickstart", "name: [", r"line \d+: not valid YAML"),
        ("name: quickstart", "name: &a x\nfoo: *a", "no YAML aliases"),
        ("name", "\x00name", "line 1: not valid YAML"),
    ):
        assert old in text
        with pytest.raises(RecipeError, match=wrong):
            rewritten(draft, text.replace(old, new, 1), shelf)


def test_no_file_that_a_recipe_can_name_is_changed_in_a_conversation() -> None:
    schema = Recipe.model_json_schema()

    def files(node: dict[str, Any], key: str) -> Iterator[str]:
        while "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
        if node.get("format") == "path":
            yield key
        for name, below in node.get("properties", {}).items():
            yield from files(below, f"{key}.{name}".strip("."))
        below_it = [node[name] for name in ("items", "additionalProperties") if isinstance(node.get(name), dict)]
        for below in (*node.get("anyOf", ()), *node.get("allOf", ()), *below_it):
            yield from files(below, key)

    named = set(files(schema, ""))
    assert {"zoo.base", "merge.simmerge.predictor", "serve.keys"} <= named
    assert {one for one in named if not one.startswith("zoo.models")} <= set(KEPT)


def test_the_stages_of_a_run_follow_its_log(tmp_path: Path) -> None:
    from composer.ui.stages import stages_of

    run = Run(tmp_path / "a-1")
    run.path.mkdir()
    assert {one.state for one in stages_of(run, going=False, now=0)} == {"ahead"}
    for stage in ("inspect", "compare", "cluster", "plan"):
        run.log(stage, "started")
        run.log(stage, "finished", seconds=1.0)
    states = {one.name: one.state for one in stages_of(run, going=False, now=0)}
    assert (states["plan"], states["approve"], states["merge"]) == ("done", "waiting", "ahead")
    run.log("approve", "finished")
    run.log("mix", "started")
    going = {one.name: one for one in stages_of(run, going=True, now=time.time() + 5)}
    assert going["mix"].state == "going"
    assert 4 < (going["mix"].seconds or 0) < 30
    assert {one.name: one.state for one in stages_of(run, going=False, now=0)}["mix"] == "stopped"
    run.log("run", AGAIN)
    assert {one.state for one in stages_of(run, going=False, now=0)} == {"ahead"}


def test_other_sites_are_refused_and_no_files_are_given(served: Served) -> None:
    def asked(path: str = "", **headers: str) -> httpx.Response:
        return httpx.get(served.url + path, headers=headers)

    page = asked()
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert asked(host="example.org").status_code == 403
    assert asked(origin="http://example.org").status_code == 403
    assert asked(origin="null").status_code == 403
    assert asked("_nicegui_ws/socket.io/?EIO=4&transport=polling", origin="http://example.org").status_code == 403
    posted = httpx.post(served.url, headers={"origin": "http://example.org"}, content=b"x")
    assert posted.status_code == 403
    for path in ("report/../tiny.yaml", "report/%2e%2e", "report/tiny", "tiny.yaml", "docs", "openapi.json"):
        assert asked(path).status_code == 404, path
    upgrade = {"connection": "Upgrade", "upgrade": "websocket", "sec-websocket-version": "13"}
    key = {"sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==", "origin": "http://example.org"}
    socket = asked("_nicegui_ws/socket.io/?EIO=4&transport=websocket", **upgrade, **key)
    assert socket.status_code == 403


def test_a_taken_port_is_one_line(served: Served, cli: Cli) -> None:
    port = served.url.rstrip("/").rpartition(":")[2]
    done = cli("ui", "--zoo", str(ROOT / "recipes" / "quickstart.yaml"), "--port", port)
    assert done.returncode == 5
    assert done.stderr.startswith(f"error: port {port}: ")
    assert len(done.stderr.splitlines()) == 1


# --- in a browser


@in_a_browser
def test_what_is_said_is_answered_and_what_others_wrote_is_text(chromium: Any, served: Served) -> None:
    page = opened(chromium, served)
    say(page, "list")
    answer = part(page, "message").filter(has_text="3 models from")
    answer.wait_for(timeout=15_000)
    assert MARKUP[:50] in answer.inner_text(), "a card's text is shown as it is"
    say(page, "<script>document.title='broken'</script>\x07 **bold** and math")
    part(page, "message").filter(has_text="<script>").first.wait_for()
    settled(page)
    tab(page, "Zoo")
    table = part(page, "models")
    table.filter(has_text="onerror").wait_for(timeout=15_000)
    assert "\u202e" not in page.inner_text("body")
    assert page.locator("img[src=x]").count() == 0
    say(page, "m" * 5000)
    page.get_by_text("a message of more than 4,000 characters is not read").wait_for()
    assert page.title() == "Model Composer"
    assert page.foreign == []
    assert page.broken == []


@in_a_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(width: int, chromium: Any, served: Served) -> None:
    page = opened(chromium, served, width)
    for name in ("Run", "Plan", "Zoo", "Evidence", "Playground"):
        tab(page, name)
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
    box = page.get_by_placeholder("Say what you want")
    box.scroll_into_view_if_needed()
    assert box.bounding_box()["width"] > width / 4
    assert page.get_by_role("button", name="Send").is_visible()


@in_a_browser
def test_a_wrong_recipe_is_told_and_a_right_one_becomes_the_draft(chromium: Any, served: Served) -> None:
    page = opened(chromium, served)
    tab(page, "Plan")
    editor = page.locator(".cm-content")
    editor.wait_for()
    page.wait_for_function("document.querySelector('.cm-content').innerText.includes('name: tiny')")
    editor.click()
    page.keyboard.press("Control+End")
    page.keyboard.type("\nnonsense: 3")
    page.get_by_role("button", name="Check").click()
    part(page, "recipe-said").filter(has_text="nonsense: unknown key").wait_for()
    page.get_by_role("button", name="Revert").click()
    page.wait_for_function("!document.querySelector('.cm-content').innerText.includes('nonsense')")
    page.get_by_role("button", name="Check").click()
    part(page, "recipe-said").filter(has_text="Right: tiny: 3 models").wait_for()


@in_a_browser
def test_what_is_said_in_a_terminal_is_seen_in_the_page(chromium: Any, served: Served) -> None:
    page = opened(chromium, served)
    subprocess.run(
        [sys.executable, "-m", "composer.cli", "chat", "--zoo", "tiny.yaml", "inspect code"],
        cwd=served.home,
        env={**os.environ, "MODEL_COMPOSER_RUNS": str(served.runs), "PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
    )
    part(page, "message").filter(has_text="4 layers of").wait_for(timeout=15_000)


@in_a_browser
@pytest.mark.slow
def test_from_a_request_to_an_answer_with_the_browser_closed_in_between(chromium: Any, served: Served) -> None:
    page = opened(chromium, served)
    say(page, "merge math and law and serve it")
    part(page, "plan-text").filter(has_text="downloads nothing").wait_for(timeout=90_000)
    assert "<b>zoo" in part(page, "plan-text").inner_text()
    part(page, "plan").get_by_role("button", name="Approve").click()
    part(page, "graph").filter(has_text="merge cluster-1").wait_for(timeout=60_000)
    page.get_by_role("button", name="Stop").wait_for(timeout=60_000)
    page.context.close()
    page = opened(chromium, served)
    page.get_by_role("button", name="Stop").wait_for(timeout=10_000)
    say(page, "merge all of them")
    page.get_by_text("one thing at a time").wait_for()
    part(page, "evidence-table").wait_for(timeout=180_000)
    assert "composite minus" in part(page, "evidence-table").inner_text().lower()
    assert "kept" in part(page, "merge-tree").inner_text()
    tab(page, "Zoo")
    page.get_by_text("Similarity of all pairs").wait_for()
    page.get_by_text("Dendrogram").wait_for()
    tab(page, "Run")
    page.get_by_text("Done.").wait_for()
    tab(page, "Playground")
    page.get_by_placeholder("Ask the composite").fill("Tom has 3 apples and")
    page.keyboard.press("Enter")
    part(page, "expert").filter(has_text="merged-1 answers").wait_for(timeout=60_000)
    page.wait_for_function("document.querySelector('[data-part=answer]').innerText.length > 3")
    report = httpx.get(served.url + "report/" + next(served.runs.glob("tiny-*")).name)
    assert "script-src" not in report.headers["content-security-policy"]
    assert report.text.startswith("<!doctype html>")
    assert page.foreign == []
    assert page.broken == []


@in_a_browser
@pytest.mark.slow
def test_a_killed_server_carries_on(chromium: Any, tmp_path: Path) -> None:
    served = start(tmp_path)
    try:
        page = opened(chromium, served)
        say(page, "merge math and law")
        part(page, "plan-text").wait_for(timeout=90_000)
        part(page, "plan").get_by_role("button", name="Approve").click()
        events = next(served.runs.glob("tiny-*")) / "events.jsonl"
        while '"merge"' not in events.read_text():
            time.sleep(0.1)
        served.process.kill()
        served.process.wait()
        page.context.close()
        served = start(tmp_path)
        page = opened(chromium, served)
        page.get_by_text("It was broken off in the middle").wait_for()
        tab(page, "Run")
        page.get_by_text("carries on from here").wait_for()
        page.get_by_role("button", name="Carry on").click()
        part(page, "plan-text").wait_for(timeout=90_000)
        part(page, "plan").get_by_role("button", name="Approve").click()
        page.get_by_role("button", name="Stop").click(timeout=60_000)
        settled(page)
        log = [json.loads(line) for line in events.read_text().splitlines()]
        assert [event["stage"] for event in log if event["event"] == "finished"].count("compare") == 1
    finally:
        assert stop(served) == 0
