"""Running generated code where it can do no harm.

A program runs in a process of its own, in user, mount, PID, network, IPC and host name spaces of its own, in a root
that is read-only and holds libraries and one empty directory, with limits on time, memory, processes and files. It sees
no other process, no network, no home, no environment. When it ends, or its time is up, all that it started is killed.
The walls are built in `jail.py`.
"""

import contextlib
import json
import os
import secrets
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, cast

import psutil

from composer.errors import EvaluationError
from composer.value import Value

SECONDS = 10.0
"""What a program may take, by the clock."""
MEMORY_MB = 512
"""Address space of each process of a program."""
PROCESSES = 8
"""Processes and threads of a program, the one that waits for it included."""
GRACE = 20.0
"""Seconds until the walls are closed, on a busy machine."""
NOBODY = 65534
"""Who runs the program where we are root, whom no limit on processes holds."""
INSIDE = 1
"""The number that nobody has inside."""
ENTER = ("--user", "--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child", "--keep-caps")
"""What `unshare` is to do before it starts the jail."""
ANSWER = 65_536
"""Bytes that are read of what the jail says; it says less."""
_JAIL = Path(__file__).with_name("jail.py")
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")


class Verdict(Value):
    """What became of a program."""

    passed: bool
    """Whether it ran to its end without an error."""
    reason: str = ""
    """What went wrong otherwise, in one line."""
    seconds: float
    """How long it took, with making the sandbox."""


def pass_at_1(
    references: Sequence[str] | str,
    predictions: Sequence[str | Sequence[str]] | str,
    seconds: float = SECONDS,
    memory_mb: int = MEMORY_MB,
) -> float:
    """Return the share of predictions that pass their tests: a metric for lm-eval tasks that ask for code.

    A program is the prediction and, after it, the test, which raises if something is wrong (`assert`). A task names it
    as `metric: !function composer.evaluation.sandbox.pass_at_1`.

    Args:
        references: The tests.
        predictions: For each test a program, or a list of which the first counts.
        seconds: What a program may take by the clock; a task gives it beside the metric, if it is to be another.
        memory_mb: Address space of each of its processes, in MB; so does this.

    Raises:
        EvaluationError: if programs cannot be shut in on this machine.
    """
    tests = [references] if isinstance(references, str) else references
    programs = [predictions] if isinstance(predictions, str) else predictions
    passed = []
    for program, test in zip(programs, tests, strict=True):
        text = program if isinstance(program, str) else program[0]
        passed.append(run(f"{text}\n{test}\n", seconds=seconds, memory_mb=memory_mb).passed)
    return sum(passed) / len(passed)


def run(program: str, *, seconds: float = SECONDS, memory_mb: int = MEMORY_MB) -> Verdict:
    """Run a Python program, with nothing but the standard library, in a sandbox.

    Args:
        program: Its text; it passes if its end is reached. `sys.exit` before that is a failure.
        seconds: What it may take by the clock; so much time of a core too.
        memory_mb: Address space of each of its processes, in MB.

    Raises:
        EvaluationError: if it cannot be shut in on this machine.
    """
    began, token = time.monotonic(), secrets.token_hex(16)
    job = {
        "program": program,
        "token": token,
        "paths": _paths(),
        "user": INSIDE if os.geteuid() == 0 else 0,
        "seconds": seconds,
        "cpu_seconds": int(seconds) + 1,
        "memory": int(memory_mb * 2**20),
        "processes": PROCESSES,
    }
    lines, error = _converse(json.dumps(job), seconds + GRACE)
    if lines[:2] != ["ready", "closed"]:
        problem = " ".join([*lines[1:], error]).strip() or "no answer"
        raise EvaluationError(
            f"generated code cannot be shut in on this machine ({problem}): "
            "it takes Linux with 'unshare' (util-linux) and user namespaces (sysctl user.max_user_namespaces above 0, "
            "kernel.apparmor_restrict_unprivileged_userns=0); or take code tasks out of evaluate.tasks"
        )
    reason = next((told for line in lines[2:] if (told := _told(line, token)) is not None), "ended without a word")
    return Verdict(passed=not reason, reason=reason, seconds=round(time.monotonic() - began, 3))


@lru_cache
def check() -> None:
    """Look once whether programs can be shut in on this machine.

    Raises:
        EvaluationError: with the reason, and what to do.
    """
    run("pass")


def _converse(job: str, seconds: float) -> tuple[list[str], str]:
    """Start a jail, give it a job and wait; return the lines that it said and what is wrong with it, if it is."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return [], "there is no program 'unshare'"
    python = [str(_interpreter()), "-I", "-S", "-X", "utf8", "-c", _JAIL.read_text()]
    deadline = time.monotonic() + seconds
    with (
        tempfile.TemporaryFile() as complaints,
        subprocess.Popen(
            [unshare, *ENTER, "--", *python],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            env={},
            cwd="/",
            start_new_session=True,
        ) as process,
    ):
        answers, orders = cast("IO[bytes]", process.stdout), cast("IO[bytes]", process.stdin)
        try:
            said = b"ready\n" if select.select([answers], [], [], seconds)[0] and os.read(answers.fileno(), 6) else b""
            if said:
                _name_user(process.pid)
                with contextlib.suppress(BrokenPipeError):
                    orders.write(job.encode() + b"\n")
                    orders.flush()
            # Nobody reads meanwhile: who says too much waits until the time is up.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
        finally:
            _kill(process)
        os.set_blocking(answers.fileno(), False)
        said += answers.read(ANSWER) or b""
        complaints.seek(0)
        error = complaints.read(ANSWER).decode(errors="replace").strip().splitlines()
    return said.decode(errors="replace").splitlines(), error[0] if error else ""


def _name_user(pid: int) -> None:
    """Say who the jail's user is outside: we ourselves, and where we are root, nobody for the program besides."""
    user, group, home = os.geteuid(), os.getegid(), Path("/proc") / str(pid)
    more = f"\n{INSIDE} {NOBODY} 1" if user == 0 else ""
    with contextlib.suppress(OSError):  # what fails here is told by what the jail fails at
        if user != 0:
            (home / "setgroups").write_text("deny")
        (home / "gid_map").write_text(f"0 {group} 1{more}")
        (home / "uid_map").write_text(f"0 {user} 1{more}")


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill a jail: with the first process of its PID namespace, whose number only we know, all others go."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()


def _told(line: str, token: str) -> str | None:
    """Return what a line says went wrong, nothing if nothing did, or None if it is not the jail's."""
    try:
        mark, problem = json.loads(line)
    except (ValueError, TypeError):
        return None
    return " ".join(str(problem).split()) if mark == token else None


def _interpreter() -> Path:
    """Return the interpreter itself, not that of a virtual environment."""
    return Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"


def _paths() -> list[str]:
    """Return what a program may read: the standard library and the machine's libraries."""
    wanted = [str(Path(os.__file__).parent.parent), f"{sys.base_prefix}/lib", *_LIBRARIES]
    return [path for path in dict.fromkeys(wanted) if Path(path).exists()]
