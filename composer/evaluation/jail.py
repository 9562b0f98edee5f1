"""What runs inside the namespaces of a sandbox: closes the walls behind itself, then runs one program.

Not imported by anything: `composer.evaluation.sandbox` hands its text to a bare interpreter (standard library only, no
environment, no site-packages) that `unshare` has put into user, mount, PID, network, IPC and host name spaces of its
own. Everything here happens as a user who owns nothing outside.

Standard input gives the job as one line of JSON. Standard output takes a line "ready", whereupon our user gets a
name inside; "closed", or what a wall fails at; and then what became of the program.
"""

import ctypes
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, REC = 1, 2, 4, 8, 32, 4096, 16384
"""Flags of mount(2)."""
LOCKED = {os.ST_NOEXEC: NOEXEC, os.ST_NOATIME: 1 << 10, os.ST_NODIRATIME: 1 << 11, os.ST_RELATIME: 1 << 21}
"""What a file system may be mounted with that a new user may not take back, and the flag that keeps it."""
SET_DUMPABLE, BOUNDING_DROP, NO_NEW_PRIVILEGES = 4, 24, 38
"""Operations of prctl(2)."""
CAPABILITIES = 64
"""More than there are."""
VERSION_3 = 0x20080522
"""Of capset(2)."""
ROOT = Path("/proc")
"""Where the new root is mounted: a directory that is everywhere and that nothing is bound from. Only we see it so."""
FILES = 16
"""Megabytes that a program may write in its working directory."""
LONGEST = 300
"""Characters of an error that are told."""

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    """Raise OSError if a system call failed."""
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def mount(source: Path | None, target: Path, kind: str | None, flags: int, options: str | None = None) -> None:
    """Mount, bind or remount."""
    texts = [None if one is None else str(one).encode() for one in (source or kind, target, kind, options)]
    check(libc.mount(*texts[:3], ctypes.c_ulong(flags), texts[3]), f"mount {target}")


def bind(path: Path, *, device: bool = False) -> None:
    """Show a file or directory of the machine at the same place under the new root, read-only."""
    target = ROOT / path.relative_to("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        target.symlink_to(path.readlink())
        return
    if path.is_dir():
        target.mkdir(exist_ok=True)
    else:
        target.touch()
    mount(path, target, None, BIND | REC)
    if not device:  # a device on a mount without devices could not be opened
        status = os.statvfs(path).f_flag
        kept = sum(flag for bit, flag in LOCKED.items() if status & bit)
        mount(None, target, None, REMOUNT | BIND | RDONLY | NOSUID | NODEV | kept)


def close_walls(job: dict[str, Any]) -> None:
    """Leave a read-only root with libraries and an empty directory in it, no rights, and little of everything.

    The interpreter's file is not among them: it runs already, and the program runs in it.
    """
    mount(None, ROOT, "tmpfs", NOSUID | NODEV, "size=1m,mode=755")
    for path in job["paths"]:
        bind(Path(path))
    bind(Path("/dev/null"), device=True)
    (ROOT / "work").mkdir()
    mount(None, ROOT / "work", "tmpfs", NOSUID | NODEV, f"size={FILES}m,nr_inodes=1000,mode=777")
    mount(None, ROOT, None, REMOUNT | BIND | RDONLY | NOSUID | NODEV)
    # A process in a changed root may not make user namespaces, by which it could get rights to mount again.
    os.chroot(ROOT)
    os.chdir("/work")
    for capability in range(CAPABILITIES):
        libc.prctl(BOUNDING_DROP, capability, 0, 0, 0)
    if job["user"]:
        os.setgroups([])
        os.setresgid(job["user"], job["user"], job["user"])
        os.setresuid(job["user"], job["user"], job["user"])
    check(libc.capset((ctypes.c_uint32 * 2)(VERSION_3, 0), (ctypes.c_uint32 * 6)()), "capset")
    check(libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0), "prctl")
    check(libc.prctl(SET_DUMPABLE, 0, 0, 0, 0), "prctl")
    for limit, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_FSIZE, FILES << 20),
        (resource.RLIMIT_NPROC, job["processes"]),
        (resource.RLIMIT_CPU, job["cpu_seconds"]),
        (resource.RLIMIT_AS, job["memory"]),
    ):
        resource.setrlimit(limit, (value, value))


def run(program: str) -> str:
    """Run a program to its end; return what went wrong, or nothing."""
    try:
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})  # noqa: S102 - what all this is for
    except BaseException as error:  # also what ends early, SystemExit
        return f"{type(error).__name__}: {error}"[:LONGEST]
    return ""


def main() -> None:
    """Read the job, close the walls, run the program in a child and tell what became of it."""
    told = os.dup(1)
    os.write(told, b"ready\n")
    job = json.loads(sys.stdin.readline())
    try:
        close_walls(job)
    except OSError as error:
        os.write(told, f"{error}\n".encode())
        os._exit(1)
    os.write(told, b"closed\n")
    null = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)

    def tell(problem: str) -> None:
        os.write(told, json.dumps([job["token"], problem]).encode() + b"\n")

    def too_long(*_: object) -> None:
        tell(f"took longer than {job['seconds']:g} s")
        os._exit(1)  # the first process of a PID namespace takes all others with it

    child = os.fork()
    if child == 0:
        own = os.getpid()
        problem = run(job["program"])
        if os.getpid() == own:  # what the program forked off comes by here too
            tell(problem)
        os._exit(0)
    # The clock runs here too, so that nothing goes on if whoever started all this is killed.
    signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, job["seconds"])
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    # The first word counts: a child that told how it ended has been heard.
    tell(f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended early with exit code {code}")


if __name__ == "__main__":
    main()
