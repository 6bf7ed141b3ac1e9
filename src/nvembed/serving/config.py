"""The settings of a server. ``None`` means off; sizes carry their unit."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from nvembed.core.config import StrictModel

Name = Annotated[str, Field(min_length=1)]


class BatchingConfig(StrictModel):
    """How texts of many requests share one forward."""

    # Tokens of one forward; a longer text goes alone. None is what the device is fastest with.
    batch_tokens: int | None = Field(default=None, ge=1)
    # Forwards side by side, which share the threads of a CPU. None is one per core up to four, and
    # one on other devices.
    forwards: int | None = Field(default=None, ge=1, le=64)
    # How long a text waits at most for others while the model is idle.
    max_wait_ms: float = Field(default=0.0, ge=0)
    # Tokens that may wait: more are refused with 429, unless the queue is empty.
    queue_tokens: int = Field(default=262_144, ge=1)


class LimitsConfig(StrictModel):
    """What one request may be, and how many may be under way."""

    max_texts: int = Field(default=2048, ge=1)  # of a request
    max_text_chars: int = Field(default=1_000_000, ge=1)
    max_body_bytes: int = Field(default=8 * 2**20, ge=1)  # as it is sent, and unpacked
    max_requests: int = Field(default=512, ge=1)  # at once; more are refused with 429
    max_inflight_bytes: int = Field(default=256 * 2**20, ge=1)  # of all bodies under way
    max_connections: int = Field(default=900, ge=1)  # each is an open file (``ulimit -n``)
    max_header_bytes: int = Field(default=64 * 2**10, ge=1)  # more are refused with 431
    # Longer than clients keep connections (5 is usual), or they use one that is being closed.
    idle_seconds: int = Field(default=30, ge=1)
    header_seconds: float = Field(default=10.0, gt=0)  # from the first byte on, else 408
    body_seconds: float = Field(default=10.0, gt=0)  # else 408
    request_seconds: float = Field(default=60.0, gt=0)  # until an answer is ready, else 503
    send_seconds: float = Field(default=30.0, gt=0)  # until a client takes a part of its answer
    shutdown_seconds: int = Field(default=60, ge=1)  # to finish what is under way at SIGTERM


class ServerConfig(StrictModel):
    """All settings of ``nvembed serve``; the file of ``--config`` has these keys."""

    model_name: str | None = Field(default=None, min_length=1)  # None is its hub id or folder name
    model_aliases: tuple[Name, ...] = ()  # further names
    # Instruction, or name of an MTEB task or of a prompt, of queries that bring none. None is the
    # prompt ``query`` that the model was saved with.
    task: Name | None = None
    # Further models by name, each loaded when it is asked for.
    models: dict[Name, Name] = Field(default_factory=dict)
    # Of all, how many are in memory at once; the longest unused one makes room.
    loaded_models: int = Field(default=2, ge=1)
    batching: BatchingConfig = BatchingConfig()  # of each model
    limits: LimitsConfig = LimitsConfig()
    log_requests: bool = True  # a line of JSON each on stderr, without texts
