"""Request bodies of both APIs: strict Pydantic models, and errors that never repeat what was sent.

A field that both APIs have stands once; its description is what a client is told when it is wrong.
``null`` for a field that may be left out is the same as leaving it out.
"""

from __future__ import annotations

import asyncio
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.config import JsonDict

from nvembed.serving.engines import Cut
from nvembed.serving.errors import RequestError
from nvembed.serving.service import Inputs

LARGE_BYTES = 64 * 1024
"""Bodies and answers above it are read and written in a thread, to keep the event loop free."""

_INPUTS = "a text, a list of texts, a list of token ids, or a list of such lists"
_TASK = "what the texts are for, the name of an MTEB task or of a prompt of the model, or null"
_PROMPT_NAME = "the name of a prompt of the model, or of an MTEB task, or null"


def _optional(description: str, meant: bool | str | None = None, **more: Any) -> Any:
    """A field that may be left out or null, which means ``meant``."""
    shown: JsonDict = {"default": meant}  # in the OpenAPI document
    return Field(default=None, description=description, json_schema_extra=shown, **more)


class Body(BaseModel):
    """Base of all request bodies: unknown keys are refused, nothing is converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class InstructionFields(Body):
    """Two names of the same field."""

    instruction: str | None = _optional(_TASK)
    task: str | None = _optional(f"the same as instruction: {_TASK}")

    def given_instruction(self) -> str | None:
        """Return what stands in one of the two; blank is none, both are refused."""
        given = [text for text in (self.instruction, self.task) if text and text.strip()]
        if len(given) > 1:
            message = "instruction and task are the same; send one of them"
            raise RequestError(400, message, param="task")
        return given[0] if given else None


class VectorFields(InstructionFields):
    """Which vectors are wanted, in which form."""

    prompt_name: str | None = _optional(_PROMPT_NAME)
    dimensions: int | None = _optional("an integer from 1 to the model's width, or null", ge=1)
    encoding_format: Literal["float", "base64"] | None = _optional(
        "'float' or 'base64' (little-endian float32)", "float"
    )


class TruncationFields(Body):
    """What becomes of long texts, as TEI says it."""

    truncate: bool | None = _optional(
        "a boolean; false refuses texts that are too long for the model, which true cuts", True
    )
    truncation_direction: Literal["Left", "Right", "left", "right"] | None = _optional(
        "'Right' (the end is cut) or 'Left' (the beginning is)", "Right"
    )

    @property
    def cut(self) -> Cut:
        """What is cut of them."""
        if self.truncate is False:
            return "none"
        return "start" if self.truncation_direction in ("Left", "left") else "end"


class OpenAIRequest(VectorFields):
    """The body of ``/v1/embeddings``: OpenAI's fields, NVIDIA NIM's and those of instructions."""

    input: Inputs = Field(description=_INPUTS)
    model: str | None = _optional("the name of a model of /v1/models, or null for the only one")
    user: str | None = _optional("a text; it is not used")
    input_type: Literal["query", "document", "passage"] | None = _optional(
        "'query', 'document', 'passage' or null (query where there is an instruction)"
    )
    truncate: Literal["END", "START", "NONE"] | None = _optional(
        "'END' or 'START' (cut of long texts) or 'NONE' (these are refused)", "END"
    )


class EmbedRequest(VectorFields, TruncationFields):
    """The body of ``/embed``."""

    inputs: Inputs = Field(description=_INPUTS)
    normalize: bool | None = _optional(
        "a boolean; false leaves vectors as the pooling gives them", True
    )


class RerankRequest(InstructionFields, TruncationFields):
    """The body of ``/rerank``."""

    query: str = Field(description="a text")
    texts: list[str] = Field(description="a list of texts")
    raw_scores: bool | None = _optional("a boolean; scores are cosines either way", False)
    return_text: bool | None = _optional("a boolean", False)


class SimilarityInputs(Body):
    """A text and those it is compared with."""

    source_sentence: str
    sentences: list[str]


class SimilarityParameters(TruncationFields):
    """How the texts of ``/similarity`` are read."""

    prompt_name: str | None = None


class SimilarityRequest(Body):
    """The body of ``/similarity``."""

    inputs: SimilarityInputs = Field(
        description="an object of source_sentence (a text) and sentences (a list of texts)"
    )
    parameters: SimilarityParameters | None = _optional(
        "an object of truncate, truncation_direction and prompt_name, or null"
    )


class TokenizeRequest(Body):
    """The body of ``/tokenize``."""

    inputs: str | list[str] = Field(description="a text or a list of texts")
    add_special_tokens: bool | None = _optional("a boolean: BOS and EOS as well", True)
    prompt_name: str | None = _optional(_PROMPT_NAME)


BodyT = TypeVar("BodyT", bound=Body)


async def read_body(raw: bytearray, cls: type[BodyT]) -> BodyT:
    """Check a body: a RequestError (400) where it is no JSON or has other fields or types."""
    try:
        if len(raw) > LARGE_BYTES:
            return await asyncio.to_thread(cls.model_validate_json, raw)
        return cls.model_validate_json(raw)
    except ValidationError as error:
        raise _bad_body(error, cls) from None


def _bad_body(error: ValidationError, cls: type[Body]) -> RequestError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        message = "the body is not valid JSON in UTF-8; check how it is built"
        return RequestError(400, message, "invalid_json")
    param = str(first["loc"][0]) if first["loc"] else None
    known = ", ".join(sorted(cls.model_fields))
    if param is None:
        message = f"the body is no JSON object; send one with the fields {known}"
    elif first["type"] == "extra_forbidden":
        message = f"unknown field {param[:60]!r}; known are {known}"
    elif first["type"] == "missing":
        message = f"the field {param!r} is missing"
    else:
        expected = cls.model_fields[param].description or first["msg"]
        message = f"the field {param!r} is of the wrong type or value; expected {expected}"
    return RequestError(400, message, "invalid_body", param=param)
