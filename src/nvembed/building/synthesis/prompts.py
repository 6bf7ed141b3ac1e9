"""The settings of a synthesis, what the model is asked, and what it may answer.

Tasks are asked for first, then one example of a task (the two steps of E5-mistral, Wang et al.
2024, which NV-Embed v2 follows, paper s4.3). Every request draws subjects, lengths and difficulty
from the seed, and has its words from ``prompts.yaml``. Of an answer the first JSON object counts;
what is not as asked is asked again.
"""

from __future__ import annotations

import json
import random
import re
from functools import cache
from importlib.resources import files
from string import Template
from typing import Annotated, Any, Literal, TypeVar, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from nvembed.core.config import StrictModel
from nvembed.core.errors import ConfigError
from nvembed.core.runs import derive_seed
from nvembed.data.similarity import text_key

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


VERSION = 1
"""Counts up when the words change: a run that was begun with others is not gone on with."""


@cache
def _words() -> dict[str, Any]:
    text = files("nvembed.building.synthesis").joinpath("prompts.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def tasks_prompt(kind: ExampleKind, count: int, seed: int, number: int) -> str:
    """Ask for ``count`` new tasks, in the request of this number among those of the kind."""
    words, rng = _words(), random.Random(derive_seed(seed, "tasks", kind, number))
    return Template(words["tasks"]).substitute(
        count=count,
        what=words["kinds"][kind]["what"],
        instances="\n".join(f"- {one}" for one in words["kinds"][kind]["instances"]),
        subjects="; ".join(rng.sample(words["subject"], 3)),
    )


def example_prompt(kind: ExampleKind, task: str, seed: int, number: int) -> str:
    """Ask for one example, that of this number among those of its task."""
    words, rng = _words(), random.Random(derive_seed(seed, "example", kind, task, number))
    names = ("query_length", "document_length", "clarity", "reader", "subject")
    drawn = {name: rng.choice(words[name]) for name in names}
    texts = {
        name: Template(words["kinds"][kind][name]).substitute(drawn)
        for name in ("query", "positive", "negative")
    }
    return Template(words["example"]).substitute(drawn, task=task, **texts)


# --- Answers --------------------------------------------------------------------------------------

_LONGEST_TASK = 400  # characters
_LONGEST_TEXT = 20_000


class AnswerError(Exception):
    """What is wrong with an answer, in a few words."""


Text = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1, max_length=_LONGEST_TEXT)
]
Task = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=_LONGEST_TASK),
    AfterValidator(lambda text: " ".join(text.split())),  # on one line
]


class TaskList(BaseModel):
    """Tasks, each one sentence."""

    model_config = ConfigDict(strict=True)
    tasks: list[Task] = Field(min_length=1, max_length=500)


class WrittenExample(BaseModel):
    """A query, a document that serves it, and one that does not."""

    model_config = ConfigDict(strict=True)
    query: Text
    positive: Text
    negative: Text

    @model_validator(mode="after")
    def _check_different(self) -> WrittenExample:
        if len({text_key(text) for text in (self.query, self.positive, self.negative)}) < 3:
            raise ValueError("two of the texts are equal")
        return self


AnswerT = TypeVar("AnswerT", bound=BaseModel)


def parse_answer(text: str, answer: type[AnswerT]) -> AnswerT:
    """Read the first JSON object of an answer, or say in an AnswerError what is wrong."""
    start = text.find("{")
    if start < 0:
        raise AnswerError("no JSON object")
    try:
        return answer.model_validate(json.JSONDecoder().raw_decode(text, start)[0])
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise AnswerError(f"{place}: {first['msg']}" if place else first["msg"]) from error
    except json.JSONDecodeError as error:
        raise AnswerError(f"broken JSON: {error.msg} at character {error.pos}") from error
    except (ValueError, RecursionError) as error:
        raise AnswerError("numbers too long or nesting too deep") from error
