"""Whole runs: end to end, killed and resumed, interrupted, refused."""

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.checkpoints import write_checkpoint
from tests.conftest import MODELS, QUICKSTART, ROOT, Cli, children, survivors, take_signals
from tests.test_adapters import KINDS, make_adapter
from tests.test_gguf import write_gguf

RECIPE = f"""\
name: small
zoo:
  models:
    - {{id: math, model: {MODELS}/stories-math, examples: ["Tom has 3 apples."]}}
    - {{id: science, model: {MODELS}/stories-science, examples: ["Why is the sky blue?"]}}
    - {{id: web, model: {MODELS}/stories-web, examples: ["Welcome to our page."]}}
merge: {{strategy: average, accept: always}}
serve: {{engine: transformers, port: 0}}
evaluate:
  include: {QUICKSTART}/tasks
  tasks: [quick_math, quick_science]
  proxy_limit: 12
  held_out_limit: 12
  batch_size: 48
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


def start(tmp_path: Path, *arguments: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "composer.cli", *arguments],
        env={**os.environ, "MODEL_COMPOSER_RUNS": str(tmp_path / "runs")},
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=take_signals,
    )


def trials(tmp_path: Path) -> dict[str, float]:
    """Return when each candidate was scored."""
    file = tmp_path / "runs" / "store" / "trials.sqlite"
    if not file.is_file():
        return {}
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=10)) as base:
        if not base.execute("SELECT 1 FROM sqlite_master WHERE name = 'trials'").fetchall():
            return {}
        return dict(base.execute("SELECT key, time FROM trials").fetchall())


def events(tmp_path: Path) -> list[dict[str, object]]:
    return [
        json.loads(line)
        for file in (tmp_path / "runs").glob("*/events.jsonl")
        for line in file.read_text().splitlines()
    ]


def wait_for(tmp_path: Path, stage: str, event: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 180
    while not any(one["stage"] == stage and one["event"] == event for one in events(tmp_path)):
        assert process.poll() is None, process.stdout.read().decode() if process.stdout else ""
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_a_run_takes_adapters_and_gguf_files_and_lists_what_it_skipped(tmp_path: Path, cli: Cli) -> None:
    make_adapter(tmp_path / "adapter", **KINDS["plain"])
    write_gguf(tmp_path / "web.gguf", source=MODELS / "stories-web")
    (tmp_path / "broken").mkdir()
    not_finite = load_file(MODELS / "stories-law" / "model.safetensors")
    not_finite["model.norm.weight"][5] = float("nan")
    write_checkpoint(tmp_path / "nan", not_finite)
    recipe = tmp_path / "kinds.yaml"
    recipe.write_text(
        RECIPE.replace("name: small", "name: kinds")
        .replace("zoo:\n", "zoo:\n  on_error: skip\n")
        .replace(f"model: {MODELS}/stories-science", f"model: {MODELS}/stories, adapter: adapter")
        .replace(f"model: {MODELS}/stories-web", "model: web.gguf")
        .replace("serve:", "cluster: {threshold: 0.9}\nserve:")
        .replace("merge:", "    - {id: broken, model: broken}\n    - {id: not-finite, model: nan}\nmerge:")
    )
    planned = cli("plan", str(recipe))
    assert planned.returncode == 0, planned.stderr
    result = cli("run", str(recipe), "--yes", "--json")
    assert result.returncode == 0, result.stderr
    path = Path(json.loads(result.stdout)["run"])
    report = json.loads((path / "report.json").read_text())
    assert [one["id"] for one in report["zoo"]["members"]] == ["math", "science", "web"]
    assert "no weights" in report["zoo"]["skipped"]["broken"]
    assert "model.norm.weight holds NaN" in report["zoo"]["skipped"]["not-finite"]
    assert report["zoo"]["base"]["path"] == str(MODELS / "stories"), "what the adapter is for"
    assert set(report["outcomes"][0]["merged"]) == {"math", "science", "web"}
    assert report["outcomes"][0]["result"]["lineage"]["dequantised"] == {"web": "Q8_0"}
    page = (path / "report.html").read_text()
    for text in ("dequantised from Q8_0", "adapter folded in", "Skipped: <b>not-finite</b>", "Skipped: <b>broken</b>"):
        assert text in page
    assert "web (from Q8_0)" in (path / "composite" / "README.md").read_text()
    finished = {one["stage"] for one in events(tmp_path) if one["event"] == "finished"}
    assert "prepare" in finished


@pytest.mark.slow
def test_killed_in_the_middle_of_merging_it_carries_on(recipe: Path, tmp_path: Path, cli: Cli) -> None:
    search = ("merge.strategy=coefficient", "merge.early_stopping=false")
    first = start(tmp_path, "run", str(recipe), "--yes", *search)
    wait_for(tmp_path, "merge", "started", first)
    deadline = time.monotonic() + 120
    while len(trials(tmp_path)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    tried = trials(tmp_path)
    assert not any(one["stage"] == "merge" and one["event"] == "finished" for one in events(tmp_path))

    second = cli("run", str(recipe), "--yes", "--json", *search)
    assert second.returncode == 0, second.stderr
    log = events(tmp_path)
    now = trials(tmp_path)
    assert len(now) == 18, "nine candidates in each of two rounds"
    assert {key: now[key] for key in tried} == tried, "what was scored is not scored again"
    starts = [one["stage"] for one in log if one["event"] == "started"]
    for stage in ("inspect", "compare", "cluster", "plan"):
        assert starts.count(stage) == 1, "finished stages are not repeated"
    assert starts.count("merge") == 2
    finished = [one["stage"] for one in log if one["event"] == "finished"]
    assert finished == [
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
    merged = list((tmp_path / "runs" / "store" / "merged").iterdir())
    assert len(merged) == 1, "of eighteen candidates one is written, and nothing half-written is left"

    answer = json.loads(second.stdout)
    assert Path(answer["report"]).is_file()
    report = json.loads((Path(answer["run"]) / "report.json").read_text())
    assert report["outcomes"][0]["merged"]
    assert [expert["id"] for expert in report["composite"]["experts"]] == ["merged-1"]

    third = cli("run", str(recipe), "--yes", *search)
    assert third.returncode == 0
    assert "report:" in third.stdout
    assert len(events(tmp_path)) == len(log), "a finished run does nothing again"

    shown = cli("show", "small")
    assert "merged-1" in shown.stdout
    assert "done" in cli("ls").stdout


@pytest.mark.slow
def test_killed_in_the_middle_of_the_evaluation_it_scores_no_task_again(recipe: Path, tmp_path: Path, cli: Cli) -> None:
    def served() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in (tmp_path / "runs" / "store" / "served").glob("[!.]*.json")}

    first = start(tmp_path, "run", str(recipe), "--yes")
    wait_for(tmp_path, "evaluate", "started", first)
    deadline = time.monotonic() + 180
    while not served():
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    before = served()
    assert not any(one["stage"] == "evaluate" and one["event"] == "finished" for one in events(tmp_path))

    second = cli("run", str(recipe), "--yes", "--json")
    assert second.returncode == 0, second.stderr
    now = served()
    assert len(now) == 2, "one file for each task"
    assert {file: now[file] for file in before} == before
    report = json.loads((Path(json.loads(second.stdout)["run"]) / "report.json").read_text())
    mine = next(one["scores"] for one in report["evidence"]["subjects"] if one["role"] == "composite")
    kept = [json.loads(file.read_text())["score"] for file in now]
    assert sorted(kept, key=str) == sorted(mine["tasks"], key=str)
    assert "uniform average of cluster-1 is merged-1 itself" in report["evidence"]["verdict"]

    again = cli("run", str(recipe), "--yes")
    assert "composing it again" not in again.stderr, "it has finished, and all is there"
    shutil.rmtree(tmp_path / "runs" / "store" / "merged")
    third = cli("run", str(recipe), "--yes")
    assert third.returncode == 0, third.stderr
    assert "is gone; composing it again" in third.stderr
    assert list((tmp_path / "runs" / "store" / "merged").glob("*/model.safetensors"))
    assert served() == now, "what is right is not scored again"


@pytest.mark.slow
def test_ctrl_c_leaves_no_engine_behind(recipe: Path, tmp_path: Path) -> None:
    process = start(tmp_path, "run", str(recipe), "--yes", "merge.strategy=none", "zoo.models.0.id=only")
    wait_for(tmp_path, "serve", "started", process)
    deadline = time.monotonic() + 60
    while len(children(process.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    engines = children(process.pid)
    assert len(engines) >= 2, "a guard and its engine"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert not survivors(engines)


@pytest.mark.slow
def test_the_quickstart_composes_serves_and_reports(cli: Cli, tmp_path: Path) -> None:
    result = cli(
        "run", str(ROOT / "recipes" / "quickstart.yaml"), "--yes", "--json",
        "serve.port=0", "evaluate.proxy_limit=48", "evaluate.held_out_limit=24",
        timeout=900,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    run = Path(json.loads(result.stdout)["run"])
    report = json.loads((run / "report.json").read_text())
    clusters = [set(one["members"]) for one in report["plan"]["clusters"]]
    assert {name for one in clusters for name in one} == {one["id"] for one in report["zoo"]["members"]}
    family = next(one for one in report["outcomes"] if any(name.startswith("stories") for name in one["merged"]))
    assert len(family["merged"]) >= 3, "the good fine-tunes merge"
    assert "stories-scrambled" not in family["merged"], "the one that hurts is found on the proxy split"
    assert "stories-scrambled" in report["composite"]["left_out"]
    engines = set(report["endpoint"]["engines"].values())
    assert engines == ({"vllm"} if find_spec("vllm") else {"transformers"})
    rows = {one["scores"]["subject"]: one for one in report["evidence"]["subjects"]}
    assert rows["quickstart"]["role"] == "composite"
    assert {one["id"] for one in report["zoo"]["members"]} <= set(rows)
    roles = [one["role"] for one in report["evidence"]["subjects"]]
    assert {"random", "oracle", "average"} <= set(roles[-4:]), "apart, below the models"
    oracle = next(one["scores"] for one in rows.values() if one["role"] == "oracle")
    for task in oracle["tasks"]:
        own = [rows[one["id"]]["scores"]["tasks"] for one in report["composite"]["experts"]]
        means = [
            sum(t["items"].values()) / len(t["items"])
            for own_tasks in own
            for t in own_tasks
            if t["task"] == task["task"]
        ]
        assert sum(task["items"].values()) / len(task["items"]) == max(means)
    assert {one["other"] for one in report["evidence"]["differences"]} == set(rows) - {"quickstart"}
    assert [one["task"] for one in report["evidence"]["by_task"]] == list(report["evidence"]["routing"])
    tried = sum(trial["tried"] for one in report["outcomes"] for trial in one["trials"])
    assert 0 < report["cost"]["tried"] <= tried
    assert report["cost"]["items"] <= 48 * 6 * report["cost"]["tried"]
    kept = [one["result"] for one in report["outcomes"] if one["result"]]
    assert report["cost"]["written_bytes"] == sum(one["size_bytes"] for one in kept)
    shown = cli("show", str(run)).stdout
    for words in ("(oracle)", "(random)", "(average)", "What the search cost", "composite minus"):
        assert words in shown
    asked = cli("router", "ask", str(run), "def add(a, b):", "--json")
    assert json.loads(asked.stdout)["expert"] == "script-code", asked.stderr
    seen = json.loads(cli("router", "report", str(run), "--json").stdout)
    assert seen["prompts"] == 48 * len(report["evidence"]["routing"])
    assert seen["value"]["best_for_each"] >= seen["value"]["routed"] > seen["value"]["random"]
    (tmp_path / "traffic.txt").write_text("hello\n\nwhat is 3 + 4?\n")
    before = (run / "composite").resolve()
    tuned = cli("router", "tune", str(run), "--texts", str(tmp_path / "traffic.txt"), "--write")
    assert tuned.returncode == 0, tuned.stderr
    assert "in the recipe: mixture: {router: {threshold:" in tuned.stdout
    assert "flatter" not in tuned.stdout, "it learnt nothing from the proxy items"
    assert (run / "composite").resolve() != before
    exported = cli("export", str(run), "--out", str(tmp_path / "mix"))
    assert exported.returncode == 0, exported.stderr
    assert (tmp_path / "mix" / "experts" / "script-code" / "model.safetensors").is_file()
    listed = cli("export", str(run), "--out", str(tmp_path / "models.yaml"), "--format", "litellm")
    assert "openai/quickstart" in (tmp_path / "models.yaml").read_text(), listed.stderr
    page = (run / "report.html").read_text()
    for text in (
        "<svg",
        "stories-scrambled",
        report["evidence"]["verdict"].split(":")[0],
        "random routing",
        "To compare with",
    ):
        assert text in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://127.0.0.1", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", ""), "the report opens without a network"


def test_without_a_yes_nothing_is_made(recipe: Path, tmp_path: Path, cli: Cli) -> None:
    result = cli("run", str(recipe))
    assert result.returncode == 8
    assert "merge 3 models one after another by linear" in result.stdout
    assert "GB of RAM" in result.stdout
    assert "run again with --yes" in result.stderr
    assert not (tmp_path / "runs" / "store" / "merged").exists()


def test_a_run_is_not_worked_on_twice(recipe: Path, tmp_path: Path, cli: Cli) -> None:
    first = start(tmp_path, "run", str(recipe), "--yes")
    wait_for(tmp_path, "inspect", "started", first)
    result = cli("run", str(recipe), "--yes")
    assert result.returncode == 9
    assert "another process is working on this run" in result.stderr
    engines = children(first.pid)
    first.kill()
    first.wait()
    assert not survivors(engines)


def test_plan_writes_nothing(recipe: Path, tmp_path: Path, cli: Cli) -> None:
    result = cli("plan", str(recipe), "--json")
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["cost"]["trials"] == 3
    assert plan["cost"]["merges"] == 1
    assert plan["clusters"][0]["members"] == ["math", "science", "web"]
    assert not (tmp_path / "runs").exists()


def test_the_plan_refuses_names_that_can_be_no_experts(recipe: Path, cli: Cli) -> None:
    result = cli("plan", str(recipe), "mixture.router.weights={merged-1: 2.0}", "mixture.router.abstain_to=mathe")
    assert result.returncode == 2, result.stdout
    wanted = "mixture.router.abstain_to: 'mathe' can be no expert; did you mean 'math'"
    assert wanted in " ".join(result.stderr.split())


def test_the_plan_says_which_example_requests_are_missing_or_the_same(recipe: Path, cli: Cli) -> None:
    line = f"    - {{id: code, model: {MODELS}/script-code}}\n"
    recipe.write_text(RECIPE.replace("merge:", f"{line}merge:"))
    result = cli("plan", str(recipe))
    assert result.returncode == 0, result.stderr
    assert "cluster-2 (code) has no example requests; they will be taken from" in " ".join(result.stdout.split())
    given = re.findall(r"examples: \[(.*?)\]", RECIPE)
    line = line.replace("script-code}", f"script-code, examples: [{', '.join(given)}]}}")
    recipe.write_text(RECIPE.replace("merge:", f"{line}merge:"))
    result = cli("plan", str(recipe))
    assert result.returncode == 2
    assert "have the same example requests, so nothing tells them apart" in result.stderr


def test_errors_are_one_line_and_an_exit_code(recipe: Path, cli: Cli) -> None:
    for arguments, code, words in (
        (["run", "absent.yaml"], 2, "there is no such recipe file"),
        (["validate", str(recipe), "merge.strategy=simmerg"], 2, "there is no strategy 'simmerg'"),
        (["run", str(recipe), "--yes", "zoo.models.0.model=/absent"], 3, "model 'math': /absent does not exist"),
        (["plan", str(recipe), "evaluate.tasks=[quick_maths]"], 6, "did you mean 'quick_math'"),
        (["show", "nothing"], 2, "there is no run 'nothing'"),
        (["rnu"], 2, "did you mean 'run'"),
    ):
        result = cli(*arguments)
        assert result.returncode == code, (arguments, result.stderr)
        assert words in result.stderr
        assert "Traceback" not in result.stderr
        lines = [line for line in result.stderr.splitlines() if "…" not in line]
        assert len(lines) == 1, lines


def test_light_verbs_do_not_import_torch(recipe: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom composer.cli import cli\n"
        "for arguments in (['--help'], ['validate', sys.argv[1]], ['ls']):\n"
        "    cli.main(arguments, standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'mergekit', 'lm_eval', 'vllm', 'langgraph'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(recipe)], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_a_zoo_of_one_is_served_as_it_is(recipe: Path, tmp_path: Path, cli: Cli) -> None:
    recipe.write_text(
        "".join(line for line in RECIPE.splitlines(True) if "id: science" not in line and "id: web" not in line)
    )
    result = cli("run", str(recipe), "--yes", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads((Path(json.loads(result.stdout)["run"]) / "report.json").read_text())
    assert report["outcomes"][0]["trials"] == []
    assert report["composite"]["router"] is None
    assert [expert["id"] for expert in report["composite"]["experts"]] == ["math"]
    rows = {one["scores"]["subject"]: one["scores"]["tasks"] for one in report["evidence"]["subjects"]}
    assert rows["small"] == rows["math"], "served as it is, it scores what it scores"


def test_a_full_disk_has_its_exit_code(recipe: Path, tmp_path: Path, cli: Cli, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(b"x" * ((1 << 20) - 40_000))
    result = cli("run", str(recipe), "--yes", MODEL_COMPOSER_RUNS=str(small_disk))
    assert result.returncode == 7, result.stderr
    assert "Traceback" not in result.stderr
    assert "free some" in result.stderr


def test_on_a_terminal_it_asks(recipe: Path, tmp_path: Path) -> None:
    primary, secondary = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "composer.cli", "run", str(recipe)],
        env={**os.environ, "MODEL_COMPOSER_RUNS": str(tmp_path / "runs"), "TERM": "xterm", "COLUMNS": "120"},
        stdin=secondary,
        stdout=secondary,
        stderr=secondary,
        cwd=tmp_path,
    )
    os.close(secondary)
    screen = b""
    while b"Go ahead?" not in screen:
        screen += os.read(primary, 4096)
    os.write(primary, b"n\n")
    with contextlib.suppress(OSError):
        while part := os.read(primary, 4096):
            screen += part
    assert process.wait(timeout=60) == 8
    text = screen.decode(errors="replace")
    assert "merge 3 models one after another by linear" in text
    assert "the plan was not approved; nothing was made" in text
    os.close(primary)
