"""Starting, watching and stopping the engines of a composite."""

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx

from composer.errors import ServeError
from composer.mixture.composite import Composite, Expert
from composer.progress import Progress, Step
from composer.serving.engines import ENGINES, EngineKind, EngineSettings
from composer.serving.engines.machine import has_gpu
from composer.serving.settings import ServeSection

DEFAULT_LENGTH = 4096
"""Longest sequence in tokens where neither recipe nor checkpoint say less."""

GPU_SHARE = 0.9
"""The part of a GPU's memory that all engines together may take."""

_GUARD = Path(__file__).with_name("guard.py")


@dataclass
class Engine:
    """One running engine."""

    expert: Expert
    kind: EngineKind
    port: int
    max_model_len: int
    process: "subprocess.Popen[bytes]"
    log: Path
    note: str | None
    """Why this kind of engine and not the usual one."""
    model: str
    """What the engine itself calls the model."""

    @property
    def url(self) -> str:
        """The engine's own address, on loopback."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None


class Supervisor:
    """Owns the engines: one per expert, each behind a guard that does not outlive this process."""

    def __init__(self, composite: Composite, section: ServeSection, logs: Path, progress: Progress) -> None:
        self.composite = composite
        self.section = section
        self.logs = logs
        self.progress = progress
        self.engines: dict[str, Engine] = {}

    def start(self) -> None:
        """Start the engines and wait until each has answered a request.

        On a GPU one after another, since each measures the memory that the others left; on a CPU as many at once
        as there are cores, since starting one is mostly importing.

        Raises:
            ServeError: if an engine is missing, dies, or is not ready in time; all are stopped then.
        """
        try:
            chosen = [(expert, *self._choose(expert)) for expert in self.composite.experts]
            together = 1 if has_gpu() else (os.cpu_count() or 1)
            for start in range(0, len(chosen), together):
                group = [self._launch(*one) for one in chosen[start : start + together]]
                for engine in group:
                    self._wait(engine)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop all engines and wait until they are gone."""
        for engine in self.engines.values():
            if engine.process.stdin:
                engine.process.stdin.close()
        for engine in self.engines.values():
            engine.process.wait()
        self.engines.clear()

    def _choose(self, expert: Expert) -> tuple[EngineKind, str | None]:
        """Return the engine for an expert, and a note if it is not the usual one."""
        wanted = self.section.engine
        names = ["vllm", "transformers"] if wanted == "auto" else [wanted]
        reasons: list[str] = []
        for name in names:
            kind = ENGINES.get(name)
            obstacle = kind.missing() or kind.unsupported(expert.checkpoint)
            if obstacle is None:
                return kind, "; ".join(reasons) or None
            reasons.append(obstacle)
        raise ServeError(f"expert '{expert.id}' cannot be served: {'; '.join(reasons)}")

    def _launch(self, expert: Expert, kind: EngineKind, note: str | None) -> Engine:
        checkpoint = expert.checkpoint.renamed(expert.id)
        experts = len(self.composite.experts)
        limit = min(checkpoint.context_length or DEFAULT_LENGTH, self.section.max_model_len or DEFAULT_LENGTH)
        dtype = self.section.dtype
        if dtype == "auto" and not has_gpu():
            dtype = "float32"
        settings = EngineSettings(
            port=free_port(),
            max_model_len=limit,
            dtype=dtype,
            kv_cache_mb=self.section.kv_cache_mb,
            threads=max(1, (os.cpu_count() or 1) // experts),
            share=GPU_SHARE / experts,
        )
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / f"engine-{expert.id}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-S", str(_GUARD), *kind.command(checkpoint, settings)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **kind.environment(settings)},
                start_new_session=True,  # Ctrl-C reaches us first; we close the pipe in good order
            )
        model = checkpoint.id if kind.name == "vllm" else checkpoint.path
        engine = Engine(expert, kind, settings.port, limit, process, log, note, model)
        self.engines[expert.id] = engine
        return engine

    def _wait(self, engine: Engine) -> None:
        """Wait until an engine has generated one token: some report that they are ready and cannot."""
        began = time.monotonic()
        request = {"model": engine.model, "prompt": "a", "max_tokens": 1, "temperature": 0}
        while True:
            waited = time.monotonic() - began
            self.progress(
                Step(
                    stage="serve",
                    message=f"{engine.kind.name} for {engine.expert.id}, {waited:.0f} s",
                    done=list(self.engines).index(engine.expert.id),
                    total=len(self.composite.experts),
                )
            )
            if not engine.alive:
                raise ServeError(
                    f"the {engine.kind.name} engine of '{engine.expert.id}' died at start: {_last_error(engine.log)} "
                    f"(log: {engine.log})"
                )
            if waited > self.section.start_timeout:
                raise ServeError(
                    f"the {engine.kind.name} engine of '{engine.expert.id}' was not ready within "
                    f"{self.section.start_timeout} s; raise serve.start_timeout (log: {engine.log})"
                )
            try:
                if httpx.get(f"{engine.url}/health", timeout=2, trust_env=False).status_code == 200:
                    answer = httpx.post(f"{engine.url}/v1/completions", json=request, timeout=120, trust_env=False)
                    if answer.status_code == 200:
                        return
                    if answer.status_code < 500:
                        raise ServeError(
                            f"the {engine.kind.name} engine of '{engine.expert.id}' refuses a one-token request: "
                            f"{answer.text[:200]} (log: {engine.log})"
                        )
            except httpx.TransportError:
                pass
            time.sleep(0.25)


def free_port() -> int:
    """Return a loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _last_error(log: Path) -> str:
    """Return the last line of a log that looks like the cause."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["it wrote nothing"])[-1][-300:]
