"""A composite behind its endpoint: engines, router and gateway, up or down together."""

from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import Field

from composer.artefacts import Store
from composer.mixture import Composite, load_router
from composer.progress import Progress, Step, silent
from composer.serving.gateway import create_app
from composer.serving.settings import ServeSection
from composer.serving.supervisor import Supervisor
from composer.serving.vitals import Vitals, take_vitals
from composer.serving.web import Web
from composer.value import Value


class Endpoint(Value):
    """Where a served composite answers, and how."""

    url: str
    """Base address, without "/v1"."""
    model: str
    """The composite's name."""
    engines: dict[str, str]
    """Kind of engine by expert."""
    max_model_len: dict[str, int]
    """Longest sequence by expert, in tokens."""
    notes: tuple[str, ...] = ()
    """Why an engine is not the usual one."""
    scores_prompts: bool
    """Whether every engine gives log-probabilities of prompts."""
    front: str = ""
    """Base address of what clients ask in its stead, if only that asks it."""
    key: str = Field(default="", exclude=True, repr=False)
    """What opens it to its own process, where it asks for keys; never written down."""

    @property
    def address(self) -> str:
        """Base address for clients."""
        return self.front or self.url

    @property
    def headers(self) -> dict[str, str]:
        """What a request of its own process must bring."""
        return {"authorization": f"Bearer {self.key}"} if self.key else {}


class Server:
    """Serves a composite while the context is open.

    The port is taken first, so that one in use is found before any engine starts; nothing is left running when
    the context closes, by whatever way.
    """

    def __init__(
        self,
        directory: Path,
        section: ServeSection,
        logs: Path,
        progress: Progress = silent,
        store: Store | None = None,
        front: str = "",
    ) -> None:
        """Prepare to serve a composite.

        Args:
            directory: Where it is.
            section: The recipe's serve settings.
            logs: Takes the engines' output.
            progress: Told of each engine.
            store: Remembers hashes; where it is given, experts that have changed since they were built are refused.
            front: Base address of a front of this machine that clients ask in its stead: it has the port of the
                settings, and asks for keys.

        Raises:
            ServeError: if there is no composite.
        """
        self.store = store
        self.directory = directory
        alone = {"host": "127.0.0.1", "port": 0, "require_key": False}
        self.section = section = section.model_copy(update=alone) if front else section
        self.front = front
        self.progress = progress
        self.composite = Composite.open(directory)
        self.supervisor = Supervisor(self.composite, section, logs, progress)
        self.endpoint: Endpoint
        self._web: Web | None = None

    def __enter__(self) -> Self:
        """Start everything and wait until it answers.

        Raises:
            ServeError: if the port is taken, API keys are missing, an expert has changed, or an engine cannot start.
        """
        try:
            web = self._web = Web(self.section)
            if self.store is not None:
                self.composite.verify(self.store)
            self.supervisor.start()
            self.progress(Step(stage="serve", message="loading the router"))
            self._start_gateway(web)
        except BaseException:
            self.stop()
            raise
        supervisor, names = self.supervisor, [expert.id for expert in self.composite.experts]
        places = [engine.place for engine in supervisor.engines]
        self.endpoint = Endpoint(
            url=web.url,
            model=self.composite.name,
            engines={name: supervisor.kind(name) for name in names},
            max_model_len={name: supervisor.max_model_len(name) for name in names},
            notes=tuple(f"{place.name}: {place.note}" for place in places if place.note),
            scores_prompts=all(supervisor.scores_prompts(name) for name in names),
            front=self.front,
            key=web.keys.own if web.keys else "",
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop taking requests, let answers that have begun come to their end, then stop the engines."""
        if self._web is not None:
            self._web.drain()
        self.supervisor.stop()
        if self._web is not None:
            self._web.close()

    def vitals(self) -> Vitals | None:
        """Return what serving takes, measured now on an otherwise idle endpoint; None if an expert does not answer."""
        engines = {one.place.name: one.process.pid for one in self.supervisor.engines if one.process is not None}
        return take_vitals(self.endpoint.url, self.endpoint.headers, list(self.endpoint.engines), engines)

    def _start_gateway(self, web: Web) -> None:
        door, gateway = create_app(
            self.composite,
            load_router(self.directory),
            self.supervisor,
            self.section,
            keys=web.keys,
            loopback=web.loopback,
        )
        self.supervisor.room = gateway.room
        web.start(door)
