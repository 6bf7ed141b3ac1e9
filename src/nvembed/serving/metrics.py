"""What Prometheus sees; one registry per server, and no label that a client can choose freely."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKENS = tuple(float(2**power) for power in range(4, 18))
_TEXTS = tuple(float(2**power) for power in range(12))


class Metrics:
    """Counters, gauges and histograms, all named ``nvembed_…``."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "nvembed_requests", "Requests answered.", ["route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "nvembed_request_seconds",
            "Request to answer.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.rejected = Counter(
            "nvembed_rejected", "Requests refused before the model.", ["reason"], registry=registry
        )
        self.cancelled = Counter(
            "nvembed_cancelled", "Requests whose client went away.", registry=registry
        )
        self.inflight = Gauge("nvembed_inflight_requests", "Requests under way.", registry=registry)
        self.queued_tokens = Gauge("nvembed_queued_tokens", "Tokens waiting.", registry=registry)
        self.queued_requests = Gauge(
            "nvembed_queued_requests", "Requests waiting.", registry=registry
        )
        self.queue_seconds = Histogram(
            "nvembed_queue_seconds",
            "Wait of a request's first text.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.model_seconds = Histogram(
            "nvembed_model_seconds", "One forward.", buckets=_SECONDS, registry=registry
        )
        self.batch_tokens = Histogram(
            "nvembed_batch_tokens", "Tokens of a forward.", buckets=_TOKENS, registry=registry
        )
        self.batch_texts = Histogram(
            "nvembed_batch_texts", "Texts of a forward.", buckets=_TEXTS, registry=registry
        )
        self.faults = Counter(
            "nvembed_model_faults", "Requests the model failed on.", registry=registry
        )

    def render(self) -> bytes:
        """Return the page of ``/metrics``."""
        return generate_latest(self.registry)
