"""Runs a command that must not outlive its parent, however the parent dies.

    python guard.py COMMAND ...

The parent holds the other end of this process's standard input. When that end closes (the parent exits, is
killed, or closes it on purpose), the command's whole process group is asked to stop, and killed if it does not.
Standard library only, run as a file, so that a guard costs a few MB.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

GRACE = 8.0
"""Seconds between asking and killing."""


def main(command: list[str]) -> int:
    """Run `command` in a process group of its own until it ends or standard input closes."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the parent decides, by closing the pipe
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_default_signals)
    threading.Thread(target=_stop_when_alone, args=(child,), daemon=True).start()
    code = child.wait()
    _signal_group(child.pid, signal.SIGKILL)  # helpers that the command left behind
    return code if code >= 0 else 128 - code


def _default_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _stop_when_alone(child: "subprocess.Popen[bytes]") -> None:
    while os.read(0, 4096):
        pass
    _signal_group(child.pid, signal.SIGTERM)
    end = time.monotonic() + GRACE
    while time.monotonic() < end and child.poll() is None:
        time.sleep(0.05)
    _signal_group(child.pid, signal.SIGKILL)


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
