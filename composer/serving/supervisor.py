"""Starting, watching, restarting and stopping the engines of a composite."""

import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx

from composer.errors import ServeError
from composer.mixture.composite import Composite
from composer.progress import Progress, Step
from composer.serving.engines import EngineSettings, Seat
from composer.serving.engines.machine import cores, has_gpu
from composer.serving.places import Place, dtype_of, longest, places_of, threads_for
from composer.serving.settings import RemoteExpert, ServeSection

State = Literal["starting", "ready", "restarting", "failed", "stopped"]

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds before an engine that died is started again: the first time, and at most; each time twice as long."""
TRIES = 8
"""Restarts in a row that may fail before an engine is given up."""
STEADY = 300.0
"""Seconds after which an engine that runs counts as sound again."""
SILENCE = 120.0
"""Seconds that an engine may leave its health unanswered (a long prompt keeps a CPU engine busy) before it is
restarted."""
LOOK = 0.5
"""Seconds between looks at the engines."""

_GUARD = Path(__file__).with_name("guard.py")
_OUT_OF_MEMORY = (
    "out of memory",
    "outofmemory",
    "not enough memory",
    "cannot allocate memory",
    "memoryerror",
    "no available memory",
    "larger than the available kv cache",
    "less than desired gpu memory",
)


@dataclass
class Engine:
    """One engine, through all its restarts."""

    place: Place
    log: Path
    secret: str
    """What its requests must bring."""
    state: State = "starting"
    port: int = 0
    restarts: int = 0
    """How often it has been restarted."""
    process: "subprocess.Popen[bytes] | None" = None
    ready_since: float = 0.0
    heard: float = 0.0
    """When its health was last seen good."""

    @property
    def url(self) -> str:
        """The engine's own address, on loopback."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process is not None and self.process.poll() is None

    @property
    def headers(self) -> dict[str, str]:
        """What proves that a request is ours."""
        return {"Authorization": f"Bearer {self.secret}"}


@dataclass
class Supervisor:
    """Owns the engines, each behind a guard that does not outlive this process; brings up again what dies."""

    composite: Composite
    section: ServeSection
    logs: Path
    progress: Progress
    engines: list[Engine] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What happened that somebody should know."""

    def __post_init__(self) -> None:
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._seats: dict[str, Engine] = {}
        self.room: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext()
        """Makes room on a GPU for an engine that is started again, where engines take turns on it."""

    def start(self) -> None:
        """Start the engines and wait until each has answered a request; then watch over them.

        On a GPU one after another, since each measures the memory that the others left; on a CPU as many at once
        as there are cores, since starting one is mostly importing.

        Raises:
            ServeError: if an engine is missing, dies, or is not ready in time; all are stopped then.
        """
        places = places_of(self.composite, self.section)
        self.engines = [
            Engine(place, self.logs / f"engine-{place.name[:120]}.log", secrets.token_urlsafe(24)) for place in places
        ]
        self._seats = {name: engine for engine in self.engines for name in engine.place.experts}
        try:
            together = 1 if has_gpu() else cores()
            for begin in range(0, len(self.engines), together):
                group = self.engines[begin : begin + together]
                for engine in group:
                    self._spawn(engine)
                for engine in group:
                    self._wait(engine)
                    if engine.place.share.sleeps:
                        self._send_to_sleep(engine)  # to make room for the next
            for name in self.section.remote:
                self._greet(name)
        except BaseException:
            self.stop()
            raise
        self._run(self._watch)

    def stop(self) -> None:
        """Stop all engines and wait until they are gone."""
        self._stopping.set()
        for engine in self.engines:
            _release(engine)
        for thread in self._threads:
            thread.join()
        for engine in self.engines:
            _release(engine)  # one that was being restarted
            if engine.process is not None:
                engine.process.wait()
            engine.state = "stopped"

    def seat(self, expert: str) -> Seat | None:
        """Return where an expert is asked; None while it cannot be."""
        remote = self.section.remote.get(expert)
        if remote is not None:
            return Seat(remote.url.rstrip("/"), remote.model or expert, headers=_remote_headers(expert, remote))
        engine = self._seats[expert]
        if engine.state != "ready" or not engine.alive:
            return None
        place = engine.place
        body = place.bodies.get(expert, {})
        return Seat(f"{engine.url}/v1", place.models[expert], body, engine.headers, place.name)

    def sharing(self) -> list[list[str]]:
        """Return the names of engines that take turns on the same GPUs; most have theirs to themselves."""
        groups: dict[tuple[int, ...], list[str]] = {}
        for engine in self.engines:
            if engine.place.share.sleeps:
                groups.setdefault(engine.place.share.gpus, []).append(engine.place.name)
        return list(groups.values())

    def states(self) -> dict[str, str]:
        """Return the state of each expert's engine; that of a remote one is for a request to find out."""
        found: dict[str, str] = {}
        for expert in self.composite.experts:
            engine = self._seats.get(expert.id)
            if engine is None:
                found[expert.id] = "remote"
            else:
                found[expert.id] = "restarting" if engine.state == "ready" and not engine.alive else engine.state
        return found

    def retry_after(self, expert: str) -> int:
        """Return in how many seconds it is worth asking an expert again that is down."""
        return 60 if self._seats[expert].state == "failed" else 10

    def restarts(self) -> dict[str, int]:
        """Return how often each engine was restarted."""
        return {engine.place.name: engine.restarts for engine in self.engines}

    def scores_prompts(self, expert: str) -> bool:
        """Return whether an expert's engine gives log-probabilities of prompts; a remote one shows when it is asked."""
        return expert not in self._seats or self._seats[expert].place.kind.scores_prompts

    def max_model_len(self, expert: str) -> int:
        """Return the longest sequence of an expert, in tokens."""
        if expert in self._seats:
            return self._seats[expert].place.max_model_len
        return longest(self.composite[expert].checkpoint, self.section)

    def kind(self, expert: str) -> str:
        """Return the name of the kind of engine of an expert."""
        return self._seats[expert].place.kind.name if expert in self._seats else "remote"

    def _spawn(self, engine: Engine) -> None:
        """Start the process of an engine, on a port that is free now."""
        place = engine.place
        engine.port = free_port()
        settings = EngineSettings(
            port=engine.port,
            max_model_len=place.max_model_len,
            dtype=dtype_of(self.section),
            kv_cache_mb=self.section.kv_cache_mb,
            threads=threads_for(len(self.engines)),
            share=place.share.part,
            gpus=place.share.gpus,
            sleeps=place.share.sleeps,
            secret=engine.secret,
        )
        self.logs.mkdir(parents=True, exist_ok=True)
        with engine.log.open("wb" if not engine.restarts else "ab") as output:
            engine.process = subprocess.Popen(
                [sys.executable, "-S", str(_GUARD), *place.command(settings)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **place.kind.environment(settings), **place.environment},
                start_new_session=True,  # Ctrl-C reaches us first; we close the pipe in good order
            )

    def _wait(self, engine: Engine) -> None:
        """Wait until an engine has generated one token for each expert: some report that they are ready and cannot.

        Raises:
            ServeError: if it dies, refuses, or is not ready in time.
        """
        began = time.monotonic()
        place = engine.place
        what = f"the {place.kind.name} engine of '{place.name}'"
        while not self._stopping.is_set():
            waited = time.monotonic() - began
            self.progress(
                Step(
                    stage="serve",
                    message=f"{place.kind.name} for {place.name}, {waited:.0f} s",
                    done=self.engines.index(engine),
                    total=len(self.engines),
                )
            )
            if not engine.alive:
                raise ServeError(f"{what} died at start: {self._why(engine)} (log: {engine.log})")
            if waited > self.section.start_timeout:
                raise ServeError(
                    f"{what} was not ready within {self.section.start_timeout} s; raise serve.start_timeout "
                    f"(log: {engine.log})"
                )
            if _good_health(engine):
                refused = self._first_tokens(engine)
                if refused is None:
                    engine.state = "ready"
                    engine.ready_since = engine.heard = time.monotonic()
                    return
                if refused:
                    raise ServeError(f"{what} refuses a one-token request: {refused} (log: {engine.log})")
            time.sleep(0.25)

    def _first_tokens(self, engine: Engine) -> str | None:
        """Ask for one token of each expert; return None if all answered, "" if it is not ready, or what it says."""
        place = engine.place
        for name in place.experts:
            extra = place.bodies.get(name, {})
            request = {"model": place.models[name], "prompt": "a", "max_tokens": 1, "temperature": 0, **extra}
            try:
                answer = httpx.post(
                    f"{engine.url}/v1/completions", json=request, timeout=120, headers=engine.headers, trust_env=False
                )
            except httpx.TransportError:
                return ""
            if answer.status_code != 200:
                return answer.text[:200] if answer.status_code < 500 else ""
        return None

    def _send_to_sleep(self, engine: Engine) -> None:
        url = f"{engine.url}/sleep?level=1"
        answer = httpx.post(url, headers=engine.headers, timeout=120, trust_env=False)
        if answer.status_code != 200:
            raise ServeError(
                f"the engines do not fit on the GPU together, and that of '{engine.place.name}' cannot sleep "
                f"({answer.status_code}); try serve.dtype=bfloat16 or serve.remote (log: {engine.log})"
            )

    def _why(self, engine: Engine) -> str:
        """Say why an engine died, and what to change if it was for want of memory."""
        text = _tail(engine.log)
        code = engine.process.poll() if engine.process is not None else None
        killed = code in (137, -9)
        if not killed and not any(sign in text.lower() for sign in _OUT_OF_MEMORY):
            return _last_error(text)
        place = engine.place
        if has_gpu():
            asked = f"it was given {place.share.part:.0%} of GPU {', '.join(map(str, place.share.gpus)) or 0}"
        else:
            cache = self.section.kv_cache_mb
            asked = (
                f"it takes about {place.memory(cache) / 1e9:.1f} GB, {place.weights / 1e9:.1f} GB of them weights in "
                f"{dtype_of(self.section)} and {cache} MB key-value cache"
            )
        said = "it was killed" if killed else _last_error(text)
        return (
            f"not enough memory: {asked} ({said}); try serve.colocate=always, serve.dtype=bfloat16, a smaller "
            "serve.kv_cache_mb or serve.max_model_len, or serve an expert elsewhere with serve.remote"
        )

    def _greet(self, name: str) -> None:
        """Look whether a remote expert is there.

        Raises:
            ServeError: if it is not, or its key is missing.
        """
        remote = self.section.remote[name]
        headers = _remote_headers(name, remote)
        self.progress(Step(stage="serve", message=f"looking for {name} at {remote.url}"))
        try:
            answer = httpx.get(f"{remote.url.rstrip('/')}/models", headers=headers, timeout=30)
        except httpx.HTTPError as error:
            raise ServeError(f"serve.remote.{name}: {remote.url} does not answer ({type(error).__name__})") from None
        if answer.status_code in (401, 403):
            raise ServeError(f"serve.remote.{name}: {remote.url} refuses the key; set serve.remote.{name}.key")
        if answer.status_code != 200:
            raise ServeError(f"serve.remote.{name}: {remote.url}/models answers {answer.status_code}")
        served = [one.get("id") for one in answer.json().get("data", [])]
        if served and (remote.model or name) not in served:
            raise ServeError(
                f"serve.remote.{name}: {remote.url} does not serve '{remote.model or name}'; it serves "
                f"{', '.join(map(str, served[:8]))}; set serve.remote.{name}.model"
            )

    def _run(self, work: Any, *arguments: Any) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _watch(self) -> None:
        """Restart what dies or falls silent, each engine in a thread of its own, so that one waits for no other."""
        while not self._stopping.wait(LOOK):
            for engine in self.engines:
                if engine.state != "ready":
                    continue
                if engine.alive and not self._silent(engine):
                    continue
                engine.state = "restarting"
                self._run(self._revive, engine)

    def _silent(self, engine: Engine) -> bool:
        now = time.monotonic()
        if now - engine.heard < SILENCE / 10:
            return False
        if _good_health(engine):
            engine.heard = now
        return time.monotonic() - engine.heard > SILENCE

    def _revive(self, engine: Engine) -> None:
        """Start an engine again, with longer pauses each time it fails."""
        name = engine.place.name
        why = self._why(engine) if not engine.alive else f"no sign of life for {SILENCE:.0f} s"
        pause, failures = FIRST_PAUSE, 0
        while not self._stopping.is_set():
            _release(engine)
            if engine.process is not None:
                engine.process.wait()
            steady = engine.ready_since and time.monotonic() - engine.ready_since > STEADY
            if failures >= TRIES:
                engine.state = "failed"
                self._note(f"{name}: given up after {TRIES} restarts; last: {why}")
                return
            self._note(f"{name}: died ({why}); starting it again")
            if not (steady and failures == 0) and self._stopping.wait(pause):
                return
            pause = min(pause * 2, LONGEST_PAUSE)
            failures += 1
            engine.restarts += 1
            try:
                with self.room(name) if engine.place.share.sleeps else nullcontext():
                    self._spawn(engine)
                    self._wait(engine)
            except (ServeError, OSError) as error:
                why = str(error)
                continue
            if engine.state == "ready":
                self._note(f"{name}: answers again")
            return

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self.progress(Step(stage="serve", message=text))


def free_port() -> int:
    """Return a loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _release(engine: Engine) -> None:
    """Let the guard of an engine stop it."""
    if engine.process is not None and engine.process.stdin and not engine.process.stdin.closed:
        engine.process.stdin.close()


def _good_health(engine: Engine) -> bool:
    try:
        return httpx.get(f"{engine.url}/health", timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def _remote_headers(name: str, remote: RemoteExpert) -> dict[str, str]:
    if remote.key is None:
        return {}
    if remote.key not in os.environ:
        raise ServeError(f"serve.remote.{name}.key: the environment has no {remote.key}")
    return {"Authorization": f"Bearer {os.environ[remote.key]}"}


def _tail(log: Path, size: int = 20_000) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - size))
        return file.read().decode(errors="replace")


def _last_error(text: str) -> str:
    """Return the last line of a log that looks like the cause."""
    lines: Sequence[str] = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["it wrote nothing"])[-1][-300:]
