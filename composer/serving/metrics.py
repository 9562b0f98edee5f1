"""What an endpoint tells Prometheus."""

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from routers import Decision

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
UP = ("ready", "remote")
"""States of an engine that answers."""
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
QUICK = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
MARGINS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8)


class Metrics:
    """Counters and histograms of one endpoint."""

    def __init__(self) -> None:
        """Begin with everything at zero."""
        self.registry = CollectorRegistry()
        registry, space = self.registry, "composer"
        self.requests = Counter(
            "requests", "Requests answered", ["path", "expert", "status"], namespace=space, registry=registry
        )
        self.seconds = Histogram(
            "request_seconds",
            "From request to last byte",
            ["path", "expert"],
            buckets=SECONDS,
            namespace=space,
            registry=registry,
        )
        self.first_byte = Histogram(
            "first_byte_seconds",
            "From request to first byte",
            ["path", "expert"],
            buckets=SECONDS,
            namespace=space,
            registry=registry,
        )
        self.open = Gauge("requests_open", "Requests being answered", namespace=space, registry=registry)
        self.routed = Counter(
            "routed",
            "Prompts routed, by expert and whether it was the fallback",
            ["expert", "fallback"],
            namespace=space,
            registry=registry,
        )
        self.routing = Histogram(
            "routing_seconds", "Time to find the expert of a prompt", buckets=QUICK, namespace=space, registry=registry
        )
        self.margin = Histogram(
            "routing_margin",
            "Difference between the best two scores",
            ["expert"],
            buckets=MARGINS,
            namespace=space,
            registry=registry,
        )
        self.failovers = Counter(
            "failovers",
            "Prompts answered by another expert since theirs was down",
            ["expert"],
            namespace=space,
            registry=registry,
        )
        self.tokens = Counter(
            "tokens", "Tokens, as engines count them", ["expert", "kind"], namespace=space, registry=registry
        )
        self.up = Gauge(
            "engine_up", "Whether an expert's engine answers", ["expert"], namespace=space, registry=registry
        )
        self.restarts = Gauge(
            "engine_restarts", "How often an engine was restarted", ["engine"], namespace=space, registry=registry
        )

    def decided(self, decision: "Decision", seconds: float) -> None:
        """Count a routing decision."""
        self.routed.labels(decision.expert, str(decision.abstained).lower()).inc()
        self.margin.labels(decision.expert).observe(decision.margin)
        self.routing.observe(seconds)

    def used(self, expert: str, usage: dict[str, object] | None) -> None:
        """Count the tokens that an answer says it took."""
        for key, kind in (("prompt_tokens", "prompt"), ("completion_tokens", "completion")):
            count = (usage or {}).get(key)
            if isinstance(count, int) and count > 0:
                self.tokens.labels(expert, kind).inc(count)

    def answered(self, path: str, expert: str, status: int, first: float, seconds: float) -> None:
        """Count an answer: seconds to its first byte, and to its last."""
        self.requests.labels(path, expert, str(status)).inc()
        self.first_byte.labels(path, expert).observe(first)
        self.seconds.labels(path, expert).observe(seconds)

    def page(self, states: dict[str, str], restarts: dict[str, int]) -> bytes:
        """Return everything in Prometheus' text format."""
        for expert, state in states.items():
            self.up.labels(expert).set(state in UP)
        for engine, count in restarts.items():
            self.restarts.labels(engine).set(count)
        return generate_latest(self.registry)
