"""What can be watched: Prometheus' metrics, and a log of one line of JSON per event on stderr.

No label holds what a client can choose freely; texts, vectors and keys never stand in the log.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKENS = tuple(float(2**power) for power in range(4, 18))
_TEXTS = tuple(float(2**power) for power in range(12))

_logger = logging.getLogger("nvembed.serving")


class Metrics:
    """Counters, gauges and histograms of one server, all named ``nvembed_…``."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, namespace="nvembed", registry=self.registry)
        gauge = partial(Gauge, namespace="nvembed", registry=self.registry)
        histogram = partial(Histogram, namespace="nvembed", registry=self.registry)
        seconds = partial(histogram, buckets=_SECONDS)
        self.requests = counter("requests", "Requests answered.", ["route", "status"])
        self.seconds = seconds("request_seconds", "Request to answer.", ["route"])
        self.rejected = counter("rejected", "Requests refused before the model.", ["reason"])
        self.cancelled = counter("cancelled", "Requests whose client went away.")
        self.inflight = gauge("inflight_requests", "Requests under way.")
        self.queued_tokens = gauge("queued_tokens", "Tokens waiting.")
        self.queued_requests = gauge("queued_requests", "Requests waiting.")
        self.loaded_models = gauge("loaded_models", "Models in memory.")
        self.queue_seconds = seconds("queue_seconds", "Wait of a request's first text.")
        self.model_seconds = seconds("model_seconds", "One forward.")
        self.batch_tokens = histogram("batch_tokens", "Tokens of a forward.", buckets=_TOKENS)
        self.batch_texts = histogram("batch_texts", "Texts of a forward.", buckets=_TEXTS)
        self.faults = counter("model_faults", "Requests the model failed on.")

    def render(self) -> bytes:
        """Return the page of ``/metrics``."""
        return generate_latest(self.registry)


def start_logging() -> None:
    """Send the events to stderr as they are."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    _logger.handlers = [handler]
    _logger.setLevel(logging.INFO)
    _logger.propagate = False


def log_event(event: str, **fields: str | int | float | None) -> None:
    """Write one event; fields that are ``None`` are left out."""
    if _logger.isEnabledFor(logging.INFO):
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        known = {name: value for name, value in fields.items() if value is not None}
        _logger.info(json.dumps({"time": time, "event": event, **known}, ensure_ascii=True))
