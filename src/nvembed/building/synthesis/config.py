"""What a synthesis makes and how it asks."""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from nvembed.core.config import StrictModel
from nvembed.core.errors import ConfigError

ExampleKind = Literal["short-long", "long-short", "short-short"]
EXAMPLE_KINDS: tuple[ExampleKind, ...] = get_args(ExampleKind)


# These do not show the value: it may hold a secret, or be the key.


def _checked_endpoint(value: str) -> str:
    parts = urlsplit(value)
    if parts.username is not None or parts.password is not None or parts.query:
        raise ValueError("holds a name, a password or a query; the key comes from the environment")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("is no address such as http://localhost:8000/v1")
    return value.rstrip("/").removesuffix("/chat/completions")


def _checked_variable(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
        raise ValueError("is no name of an environment variable")
    return value


class SynthesisConfig(StrictModel):
    """Settings of a synthesis.

    NV-Embed v2 used 60,000 tasks of the three kinds and 120,000 examples, 40,000 of each kind,
    written by Mixtral-8x22B-Instruct (paper s4.3).

    Args:
        endpoint: base URL of an OpenAI-compatible API, such as ``http://localhost:8000/v1``.
        model: name of the model there.
        kinds: lengths of query and document.
        tasks: different tasks of each kind.
        examples_per_task: examples asked for per task.
        tasks_per_request: tasks asked for at once; more of them are less alike.
        seed: decides what every request asks.
        temperature: the model's; low ones give the same tasks again and again.
        max_answer_tokens: where an answer is cut.
        attempts: times that a request is asked again whose answer is no valid JSON.
        key_variable: environment variable with the key of the endpoint; without a value, no key is
            sent.
        concurrency: requests in flight.
        requests_per_minute: None for no limit of our own.
        timeout: seconds that an answer may take.
        retries: times that a request is sent again after a timeout, a lost connection, an overload
            (429) or an error of the server (5xx).
        retry_delay: seconds before the first of them; it doubles from one to the next, up to a
            minute. What the endpoint asks for (Retry-After) goes before.
    """

    endpoint: Annotated[str, AfterValidator(_checked_endpoint)]
    model: str = Field(min_length=1)
    kinds: tuple[ExampleKind, ...] = Field(default=EXAMPLE_KINDS, min_length=1)
    tasks: int = Field(default=100, ge=1)
    examples_per_task: int = Field(default=2, ge=1)
    tasks_per_request: int = Field(default=20, ge=1, le=100)
    seed: int = Field(default=0, ge=0)
    temperature: float = Field(default=1.0, ge=0, le=2)
    max_answer_tokens: int = Field(default=2048, ge=16)
    attempts: int = Field(default=3, ge=1)
    key_variable: Annotated[str, AfterValidator(_checked_variable)] = "OPENAI_API_KEY"
    concurrency: int = Field(default=16, ge=1, le=1024)
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    timeout: float = Field(default=120.0, gt=0)
    retries: int = Field(default=6, ge=0)
    retry_delay: float = Field(default=1.0, ge=0)


def check_secrets(endpoint: str, key_variable: str) -> None:
    """Refuse options that may hold a secret in the wrong place, before they are shown anywhere."""
    for option, check, value in (
        ("--endpoint", _checked_endpoint, endpoint),
        ("--key-variable", _checked_variable, key_variable),
    ):
        try:
            check(value)
        except ValueError as error:
            raise ConfigError(str(error), where=option) from None
