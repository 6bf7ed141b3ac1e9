"""The settings of a server. ``None`` means off; sizes carry their unit."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from nvembed.core.config import StrictModel


class BatchingConfig(StrictModel):
    """How texts of many requests share one forward.

    Args:
        batch_tokens: tokens of one forward; a longer text goes alone. ``None`` is what the device
            is fastest with.
        forwards: forwards that run side by side; the threads of a CPU are shared out to them.
            ``None`` is one per core up to four, and one on other devices.
        max_wait_ms: how long a text waits at most for others while the model is idle. Texts that
            come while it works share the next forward anyway.
        queue_tokens: tokens that may wait; a request that would exceed them is refused with 429.
            One that finds the queue empty is always taken.
    """

    batch_tokens: int | None = Field(default=None, ge=1)
    forwards: int | None = Field(default=None, ge=1, le=64)
    max_wait_ms: float = Field(default=0.0, ge=0)
    queue_tokens: int = Field(default=262_144, ge=1)


class LimitsConfig(StrictModel):
    """What one request may be, and how many may be under way.

    Args:
        max_texts: texts of a request.
        max_text_chars: characters of a text; it is cut to the model's tokens all the same.
        max_body_bytes: bytes of a request's body, as it is sent and unpacked.
        max_requests: requests under way at once; more are refused with 429.
        max_inflight_bytes: bytes of all bodies under way; more are refused with 429.
        max_connections: connections open at once; more are closed unread. Each takes one of the
            files that a process may have open (``ulimit -n``, often 1,024).
        max_header_bytes: bytes of a request's headers (431).
        idle_seconds: a connection waits as long for its next request. Longer than clients keep
            theirs (5 seconds is usual), or they send a request into a connection being closed.
        header_seconds: headers must have arrived by then, from the connection or the first byte
            on (408).
        body_seconds: a body must have arrived by then (408).
        request_seconds: an answer is ready by then, or the request is given up (503).
        send_seconds: a client takes a part of its answer by then, or the connection is closed.
        shutdown_seconds: what is under way at SIGTERM has as long to finish.
    """

    max_texts: int = Field(default=2048, ge=1)
    max_text_chars: int = Field(default=1_000_000, ge=1)
    max_body_bytes: int = Field(default=8 * 2**20, ge=1)
    max_requests: int = Field(default=512, ge=1)
    max_inflight_bytes: int = Field(default=256 * 2**20, ge=1)
    max_connections: int = Field(default=900, ge=1)
    max_header_bytes: int = Field(default=64 * 2**10, ge=1)
    idle_seconds: int = Field(default=30, ge=1)
    header_seconds: float = Field(default=10.0, gt=0)
    body_seconds: float = Field(default=10.0, gt=0)
    request_seconds: float = Field(default=60.0, gt=0)
    send_seconds: float = Field(default=30.0, gt=0)
    shutdown_seconds: int = Field(default=60, ge=1)


class ServerConfig(StrictModel):
    """All settings of ``nvembed serve``; the file of ``--config`` has these keys.

    Args:
        model_name: what clients call the model; ``None`` is its hub id or the name of its folder.
        model_aliases: further names for it; its folder or hub id are names of it in any case.
        batching: see the class.
        limits: see the class.
        log_requests: one line of JSON per request on stderr, without texts.
    """

    model_name: str | None = Field(default=None, min_length=1)
    model_aliases: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    batching: BatchingConfig = BatchingConfig()
    limits: LimitsConfig = LimitsConfig()
    log_requests: bool = True
