"""Answers of the model, checked: JSON in, tasks or an example out.

A model may put its JSON into a code block or words around it; the first object counts. Anything
else that is not as asked is refused and asked again. Next file: ``endpoint.py``.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from nvembed.mining.corpus import text_key

_LONGEST_TASK = 400  # characters
_LONGEST_TEXT = 20_000


class AnswerError(Exception):
    """What is wrong with an answer, in a few words."""


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    return text.strip()


def _one_line(text: str) -> str:
    return " ".join(text.split())


Text = Annotated[str, Field(max_length=_LONGEST_TEXT), AfterValidator(_not_blank)]
Task = Annotated[
    str, Field(max_length=_LONGEST_TASK), AfterValidator(_not_blank), AfterValidator(_one_line)
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
    """Read the first JSON object of an answer.

    Raises:
        AnswerError: there is none, or it is not as asked.
    """
    start = text.find("{")
    if start < 0:
        raise AnswerError("no JSON object")
    try:
        value: Any = json.JSONDecoder().raw_decode(text, start)[0]
    except json.JSONDecodeError as error:
        raise AnswerError(f"broken JSON: {error.msg} at character {error.pos}") from error
    except (ValueError, RecursionError) as error:
        raise AnswerError("numbers too long or nesting too deep") from error
    try:
        return answer.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise AnswerError(f"{place}: {first['msg']}" if place else first["msg"]) from error
