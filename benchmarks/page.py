"""How long the page takes: to load, to answer, and to show what a run does.

    python benchmarks/page.py

A real server about the quickstart zoo, a real headless Chromium with an empty cache, a real run without serving. How
late progress is: from the time a stage notes in the run's log to when the browser has drawn it, looked at every 20 ms.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
LOADS = 7
SEEN = """() => [...document.querySelectorAll('[data-stage]')].filter(one => one.dataset.state != 'ahead'
    && one.dataset.state != 'waiting').map(one => one.dataset.stage)"""


def main() -> None:
    """Measure, and print one line for each figure."""
    with tempfile.TemporaryDirectory() as home, sync_playwright() as driver:
        server, url = start(Path(home))
        try:
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            print(f"load average at the start: {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs")
            print(f"page loads: {', '.join(f'{load(browser, url):.2f}' for _ in range(LOADS))} s")
            page = browser.new_page()
            page.goto(url)
            page.get_by_placeholder("Say what you want").wait_for()
            print(f"first answer: {answer(page, 'list'):.2f} s")
            later = [answer(page, f"inspect {name}") for name in ("math", "law", "web", "code", "play")]
            print(f"later answers: median {statistics.median(later):.2f} s, longest {max(later):.2f} s")
            late = lateness(page, Path(home) / "runs")
            print(f"progress on the page after: median {statistics.median(late):.2f} s, longest {max(late):.2f} s")
            print(f"  ({len(late)} stages)")
        finally:
            server.terminate()
            server.wait()


def start(home: Path) -> "tuple[subprocess.Popen[str], str]":
    """Start the server; return it and its address."""
    command = [
        sys.executable,
        "-m",
        "composer.cli",
        "ui",
        "--zoo",
        str(ROOT / "recipes/quickstart.yaml"),
        "--port",
        "0",
    ]
    environment = {**os.environ, "MODEL_COMPOSER_RUNS": str(home / "runs"), "PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    assert server.stdout is not None
    found = re.search(r"http://\S+", server.stdout.readline())
    assert found
    time.sleep(5)  # a person takes longer to get to the browser
    return server, found[0]


def load(browser: Any, url: str) -> float:
    """Return the seconds from asking for the page to a box that can be written into, with nothing cached."""
    context = browser.new_context()
    page, began = context.new_page(), time.perf_counter()
    page.goto(url)
    page.get_by_placeholder("Say what you want").wait_for()
    taken = time.perf_counter() - began
    context.close()
    return taken


def answer(page: Any, message: str) -> float:
    """Return the seconds from Enter to an answer that can be read."""
    messages = page.locator('[data-part="message"]')
    before = messages.count()
    page.get_by_placeholder("Say what you want").fill(message)
    began = time.perf_counter()
    page.keyboard.press("Enter")
    messages.nth(before + 1).wait_for()
    return time.perf_counter() - began


def lateness(page: Any, runs: Path) -> list[float]:
    """Return for each stage the seconds between its beginning and when the page shows it."""
    page.get_by_placeholder("Say what you want").fill("merge math, science and law with linear; 24 items per task")
    page.keyboard.press("Enter")
    seen: dict[str, float] = {}
    page.locator('[data-part="plan-text"]').wait_for(timeout=300_000)
    page.get_by_role("tab", name="Run").click()
    known = set(page.evaluate(SEEN))
    page.get_by_role("button", name="Approve").first.click()
    while "report" not in seen:
        for name in page.evaluate(SEEN):
            seen.setdefault(name, time.time())
        time.sleep(0.02)
    [log] = runs.glob("*/events.jsonl")
    began = {}
    for event in map(json.loads, log.read_text().splitlines()):
        if event["event"] == "started":
            began.setdefault(event["stage"], event["time"])
    return [seen[name] - when for name, when in began.items() if name in seen and name not in known]


if __name__ == "__main__":
    main()
