"""The sandbox: right programs pass, wrong ones fail, and harmful ones do no harm; all of them are really run."""

import os
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from composer.artefacts import Store
from composer.errors import EvaluationError
from composer.evaluation import sandbox
from composer.evaluation.in_process import answer_checkpoint, score_checkpoint
from composer.evaluation.sandbox import check, pass_at_1, run
from composer.evaluation.tasks import _manager, load_split, run_tasks
from composer.zoo import Checkpoint
from tests.conftest import ROOT, Cli, survivors

CODE_TASKS = ROOT / "tests" / "code_tasks"


def confined() -> bool:
    try:
        check()
    except EvaluationError:
        return False
    return True


pytestmark = pytest.mark.skipif(not confined(), reason="this machine gives no user namespaces")


def mounts() -> list[str]:
    return Path("/proc/self/mounts").read_text().splitlines()


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path: Path) -> Iterator[None]:
    """Whatever a test ran: no process of it lives on, and nothing of it is mounted."""
    ours, before = psutil.Process(), mounts()
    processes = set(ours.children(recursive=True))
    yield
    assert not survivors([one for one in ours.children(recursive=True) if one not in processes], seconds=2)
    assert mounts() == before


def program(text: str) -> str:
    return textwrap.dedent(text)


def test_a_right_program_passes_and_a_wrong_one_fails() -> None:
    right = "def double(x):\n    return 2 * x\n"
    verdict = run(right + "assert double(3) == 6")
    assert (verdict.passed, verdict.reason) == (True, "")
    assert 0 < verdict.seconds < sandbox.SECONDS
    wrong = run(right + "assert double(3) == 7, 'not seven'")
    assert (wrong.passed, wrong.reason) == (False, "AssertionError: not seven")
    assert run("def f(:").reason.startswith("SyntaxError")
    assert run("import decimal, json, re, sqlite3, ssl, collections\nopen('mine', 'w').write('x')").passed


def test_the_metric_is_the_share_that_passes() -> None:
    tests = ["assert f() == 1", "assert f() == 2"]
    assert pass_at_1(references=tests, predictions=["def f(): return 1"] * 2) == 0.5
    assert pass_at_1(references=tests[:1], predictions=[["def f(): return 1"]], seconds=5) == 1.0
    assert pass_at_1(references=tests[:1], predictions=["while True: pass"], seconds=1) == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import ctypes; ctypes.string_at(0)",
        "import os\nif os.fork():\n    raise ValueError('the test failed')",  # the other one gets to the end
    ],
)
def test_a_program_that_does_not_get_to_its_end_has_failed(text: str) -> None:
    assert not run(f"{text}\n", seconds=5).passed


@pytest.mark.parametrize("text", ["while True: pass", "import time; time.sleep(1000)"])
def test_time_is_limited(text: str) -> None:
    began = time.monotonic()
    verdict = run(text, seconds=1)
    assert (verdict.passed, verdict.reason) == (False, "took longer than 1 s")
    assert time.monotonic() - began < 10


def test_processes_are_limited_and_die_with_their_program() -> None:
    bomb = """
        import os, time
        born = 0
        try:
            while True:
                if os.fork() == 0:
                    os.setsid()
                    time.sleep(1000)
                born += 1
        except BlockingIOError:
            raise RuntimeError(f"born: {born}")
    """
    verdict = run(program(bomb), seconds=10)
    # Besides the first process and the program; unshare counts where it is started by the same user.
    assert verdict.reason in {f"RuntimeError: born: {sandbox.PROCESSES - one}" for one in (2, 3)}
    assert not run("import os\nwhile True: os.fork()", seconds=2).passed


def test_memory_and_files_are_limited() -> None:
    assert run("x = b'1' * (1 << 30)", memory_mb=256).reason.startswith("MemoryError")
    assert run("x = b'1' * (1 << 27)", memory_mb=256).passed
    assert "Error" in run("f = open('big', 'wb')\nwhile True: f.write(bytes(1 << 20))").reason
    many = "for n in range(100):\n    with open(str(n), 'wb') as f: f.write(bytes(1 << 20))"
    assert "No space left" in run(many).reason


def test_there_is_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        listener.settimeout(0.1)
        verdict = run(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 3)")
        assert "Network is unreachable" in verdict.reason
        with pytest.raises(TimeoutError):
            listener.accept()
    interfaces = run("import socket\nassert [name for _, name in socket.if_nameindex()] == ['lo']")
    assert interfaces.passed, interfaces.reason


def test_nothing_outside_is_read_or_written(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("the secret")
    for path in ("/etc/passwd", "/proc/self/environ", "/proc/1/environ", tmp_path / "secret", Path(__file__)):
        assert run(f"open({str(path)!r}).read()").reason.startswith("FileNotFoundError"), path
    home = run(f"import os\nraise ValueError(sorted(os.listdir({str(Path.home())!r})))").reason
    assert home.startswith("FileNotFoundError") or not {".bashrc", ".ssh", ".cache"} & set(home.split("'"))
    for path in (tmp_path / "mine", "/mine", "/tmp/mine", "/usr/lib/mine", Path(os.__file__).parent / "mine"):  # noqa: S108
        assert run(f"open({str(path)!r}, 'w')").reason.split(":")[0] in ("OSError", "FileNotFoundError"), path
        assert not Path(path).exists()
    assert [one.name for one in tmp_path.iterdir()] == ["secret"]


def test_the_environment_is_empty_and_there_is_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "the secret")
    seen = run("import os\nassert set(os.environ) <= {'LC_CTYPE'}, dict(os.environ)\nassert os.getpid() < 5")
    assert seen.passed, seen.reason
    assert "ProcessLookupError" in run(f"import os\nos.kill({os.getpid()}, 9)").reason


def test_there_are_no_rights_to_get_out_with() -> None:
    escapes = """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        tried = {
            "mount": libc.mount(b"none", b"/work", b"tmpfs", 0, None),
            "remount": libc.mount(None, b"/", None, ctypes.c_ulong(32 | 4096), None),
            "unmount": libc.umount2(b"/usr/lib", 2),
            "user namespace": libc.unshare(0x10000000),
            "network namespace": libc.unshare(0x40000000),
            "host name": libc.sethostname(b"mine", 4),
            "trace the first process": libc.ptrace(16, 1, None, None),
        }
        for name, call in (("chroot", lambda: os.chroot("/work")), ("become root", lambda: os.setuid(12))):
            try:
                call()
                tried[name] = 0
            except OSError:
                tried[name] = -1
        got = [name for name, result in tried.items() if result == 0]
        assert not got, got
    """
    verdict = run(program(escapes))
    assert verdict.passed, verdict.reason


def test_it_ends_with_whoever_started_it() -> None:
    code = "from composer.evaluation.sandbox import run\nrun('import time; time.sleep(1000)', seconds=3)"
    starter = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 60
    while len(inside := psutil.Process(starter.pid).children(recursive=True)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(inside) >= 3, "unshare, the first process, and the program"
    starter.kill()
    starter.wait()
    assert not survivors(inside, seconds=20)


def test_a_machine_that_cannot_shut_code_in_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        EvaluationError, match=r"cannot be shut in on this machine .there is no program 'unshare'.*tasks"
    ):
        run("pass")
    broken = tmp_path / "unshare"
    broken.write_text(
        "#!/bin/sh\necho 'unshare: unshare failed: Operation not permitted' >&2; echo 'more' >&2\nexit 1\n"
    )
    broken.chmod(0o755)
    with pytest.raises(EvaluationError, match="unshare failed: Operation not permitted"):
        run("pass")


def test_code_runs_only_where_the_recipe_says_so(tmp_path: Path) -> None:
    include = str(CODE_TASKS)
    with pytest.raises(EvaluationError, match=r"task 'tiny_code' runs code .* 'evaluate: \{sandbox: true\}'"):
        load_split(["tiny_code"], "proxy", include=include)
    assert load_split(["tiny_code"], "proxy", include=include, sandbox=True).tasks[0].metric == "pass_at_1"


@pytest.mark.parametrize(
    ("line", "words"),
    [("k: [1]", "has no 'k'"), ("seconds: soon", "seconds of the metric is 'soon'"), ("memory_mb: 0", "above 0")],
)
def test_what_stands_beside_the_metric_is_checked(line: str, words: str, tmp_path: Path) -> None:
    text = (CODE_TASKS / "tiny_code.yaml").read_text().replace("seconds: 5", line).replace("tiny_code", "other_code")
    (tmp_path / "other.yaml").write_text(text)
    with pytest.raises(EvaluationError, match=words):
        load_split(["other_code"], "proxy", include=str(tmp_path), sandbox=True)


def test_code_never_runs_outside_of_the_sandbox(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    (tmp_path / "own.py").write_text(
        f"open({str(touched)!r}, 'w')\n\ndef pass_at_1(**_):\n    return 1.0\n"  # as lm-eval's own do: when imported
    )
    text = (CODE_TASKS / "tiny_code.yaml").read_text().replace("tiny_code", "own_code")
    text = text.replace("tiny_loader.", f"{'tests.code_tasks.tiny_loader'}.")
    for changed in (
        text.replace("composer.evaluation.sandbox.pass_at_1", "own.pass_at_1"),
        text.replace("num_fewshot: 0", "num_fewshot: 0\nprocess_results: !function own.pass_at_1"),
        text[: text.index("metric_list")],
    ):
        (tmp_path / "own.yaml").write_text(changed)
        for sandboxed in (False, True):
            _manager.cache_clear()
            with pytest.raises(EvaluationError, match=r"runs generated code by .*, outside of any sandbox"):
                load_split(["own_code"], "proxy", include=str(tmp_path), sandbox=sandboxed)
    assert not touched.exists()


def test_tasks_of_lm_evals_own_are_refused_before_they_are_imported() -> None:
    for name in ("humaneval", "mbpp"):
        with pytest.raises(
            EvaluationError, match=f"task '{name}' runs generated code by utils.* outside of any sandbox"
        ):
            load_split([name], "proxy", sandbox=True)


def test_the_plan_refuses_code_that_the_recipe_does_not_allow(tmp_path: Path, cli: Cli) -> None:
    recipe = tmp_path / "code.yaml"
    models = ROOT / "recipes" / "quickstart" / "models"
    recipe.write_text(
        f"name: coder\nzoo:\n  models:\n    - {{id: code, model: {models}/script-code}}\n"
        f"evaluate: {{include: {CODE_TASKS}, tasks: [tiny_code]}}\n"
    )
    refused = cli("plan", str(recipe))
    assert refused.returncode == 6
    assert "evaluate: {sandbox: true}" in refused.stderr
    assert len([line for line in refused.stderr.splitlines() if "…" not in line]) == 1, refused.stderr
    refused = cli("run", str(recipe), "--yes")
    assert refused.returncode == 6, "and so does the run, before it reads any model"
    assert not (tmp_path / "runs" / "store" / "hashes").exists()
    planned = cli("plan", str(recipe), "evaluate.sandbox=true")
    assert planned.returncode == 0, planned.stderr


def test_what_a_model_writes_is_run_and_scored(quick: dict[str, Checkpoint], store: Store) -> None:
    split = load_split(["tiny_code"], "held_out", include=str(CODE_TASKS), sandbox=True)
    scores = score_checkpoint(quick["script-code"], split, store)
    assert set(scores.task("tiny_code").items.values()) <= {0.0, 1.0}
    assert score_checkpoint(quick["script-code"], split, store) == scores, "known, by what the task's functions say"
    assert answer_checkpoint(quick["script-code"], split, store).tasks == (), "it chooses nothing"


def test_a_model_that_can_program_passes() -> None:
    from lm_eval.api.model import LM

    class Programmer(LM):  # type: ignore[misc]
        """Knows the answers to one of two."""

        def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
            return [" text + text" if "twice" in one.args[0] else " None" for one in requests]

        def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list:
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    split = load_split(["tiny_code"], "held_out", include=str(CODE_TASKS), sandbox=True)
    task = run_tasks(Programmer(), split, "programmer").task("tiny_code")
    documents = list(split.tasks[0].task.eval_docs)
    names = dict(
        zip(split.tasks[0].hashes, (documents[index]["name"] for index in split.tasks[0].indices), strict=True)
    )
    assert {names[item]: value for item, value in task.items.items()} == {"twice": 1.0, "first": 0.0}
