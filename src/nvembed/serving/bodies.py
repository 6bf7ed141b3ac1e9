"""Request bodies of OpenAI and TEI: strict models, and errors that never repeat what was sent.

Those of other APIs are in ``vendor_bodies.py``. A field that several have stands once; its
description is what a client is told when it is wrong. ``null`` for a field that may be left out is
the same as leaving it out.
"""

from __future__ import annotations

import asyncio
from typing import Any, Literal, TypeVar, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.config import JsonDict

from nvembed.serving.engines import Cut
from nvembed.serving.errors import RequestError
from nvembed.serving.service import Inputs, JinaPurpose
from nvembed.serving.vectors import Dtype

LARGE_BYTES = 64 * 1024
"""Bodies and answers above it are read and written in a thread, to keep the event loop free."""

_INPUTS = "a text, a list of texts, a list of token ids, or a list of such lists"
_TASK = "what the texts are for, the name of an MTEB task or of a prompt of the model, or null"
_DTYPE = "'float', 'int8', 'uint8', 'binary' or 'ubinary'"
_PROMPT_NAME = "the name of a prompt of the model, or of an MTEB task, or null"


def optional(description: str, meant: bool | str | None = None, **more: Any) -> Any:
    """A field that may be left out or null, which means ``meant``."""
    shown: JsonDict = {"default": meant}  # in the OpenAPI document
    return Field(default=None, description=description, json_schema_extra=shown, **more)


class Body(BaseModel):
    """Base of all request bodies: unknown keys are refused, nothing is converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    def one_of(self, *names: str) -> Any:
        """Return a field that has several names; blank is not given, two of them are refused."""
        values = ((name, getattr(self, name)) for name in names)
        given = [(n, v) for n, v in values if v is not None and str(v).strip()]
        if len(given) > 1:
            message = f"{' and '.join(name for name, _ in given)} are the same; send one of them"
            raise RequestError(400, message, param=given[1][0])
        return given[0][1] if given else None


class ModelField(Body):
    """Which model is meant."""

    model: str | None = optional("the name of a model of /v1/models, or null for the first")


class InstructionFields(Body):
    """Two names of the same field."""

    instruction: str | None = optional(_TASK)
    task: str | None = optional(f"the same as instruction: {_TASK}")

    def given_instruction(self) -> str | None:
        """Return what stands in one of the two; blank is none, both are refused."""
        return self.one_of("instruction", "task")


class VectorFields(InstructionFields):
    """Which vectors are wanted, in which form."""

    prompt_name: str | None = optional(_PROMPT_NAME)
    dimensions: int | None = optional("an integer from 1 to the model's width, or null", ge=1)
    encoding_format: Literal["float", "base64"] | None = optional(
        "'float' or 'base64' (little-endian float32)", "float"
    )


class TruncationFields(Body):
    """What becomes of long texts, as TEI says it."""

    truncate: bool | None = optional(
        "a boolean; false refuses texts that are too long for the model, which true cuts", True
    )
    truncation_direction: Literal["Left", "Right", "left", "right"] | None = optional(
        "'Right' (the end is cut) or 'Left' (the beginning is)", "Right"
    )

    @property
    def cut(self) -> Cut:
        """What is cut of them."""
        if self.truncate is False:
            return "none"
        return "start" if self.truncation_direction in ("Left", "left") else "end"


class OpenAIRequest(ModelField, VectorFields):
    """The body of ``/v1/embeddings``: OpenAI's fields, and those that others add to them.

    NVIDIA NIM's are ``input_type`` and ``truncate``; Jina's ``embedding_type`` and values of
    ``task``; Voyage's ``output_dtype``, ``output_dimension`` and ``truncation``.
    """

    input: Inputs = Field(description=_INPUTS)
    user: str | None = optional("a text; it is not used")
    input_type: Literal["query", "document", "passage"] | None = optional(
        "'query', 'document', 'passage' or null (query where there is an instruction)"
    )
    truncate: Literal["END", "START", "NONE"] | bool | None = optional(
        "'END' or 'START' (cut of long texts), 'NONE' (these are refused), or a boolean", "END"
    )
    truncation: bool | None = optional("a boolean; the same as truncate")
    output_dimension: int | None = optional("the same as dimensions", ge=1)
    output_dtype: Dtype | None = optional(_DTYPE, "float")
    embedding_type: Dtype | Literal["base64"] | None = optional(
        f"the same as output_dtype, {_DTYPE}; or 'base64'"
    )

    @property
    def purpose(self) -> JinaPurpose | None:
        """What Jina calls the task, which is no instruction."""
        return cast(JinaPurpose, self.task) if self.task in get_args(JinaPurpose) else None

    def given_instruction(self) -> str | None:
        """Return the instruction, under either name."""
        if self.purpose is None:
            return super().given_instruction()
        return self.one_of("instruction")

    @property
    def cut(self) -> Cut:
        """What is cut of long texts."""
        told = self.one_of("truncate", "truncation")
        if isinstance(told, str):
            return cast(Cut, told.lower())
        return "none" if told is False else "end"

    @property
    def form(self) -> tuple[Dtype, bool]:
        """The type of the numbers, and whether they are packed."""
        packed = self.encoding_format == "base64"
        if self.embedding_type == "base64":
            return self.output_dtype or "float", True
        return self.one_of("output_dtype", "embedding_type") or "float", packed


class EmbedRequest(VectorFields, TruncationFields):
    """The body of ``/embed``."""

    inputs: Inputs = Field(description=_INPUTS)
    normalize: bool | None = optional(
        "a boolean; false leaves vectors as the pooling gives them", True
    )


class RerankRequest(InstructionFields, TruncationFields):
    """The body of ``/rerank``."""

    query: str = Field(description="a text")
    texts: list[str] = Field(description="a list of texts")
    raw_scores: bool | None = optional("a boolean; scores are cosines either way", False)
    return_text: bool | None = optional("a boolean", False)


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
    parameters: SimilarityParameters | None = optional(
        "an object of truncate, truncation_direction and prompt_name, or null"
    )


class RootRequest(EmbedRequest):
    """The body of ``/``, where the client of the Hugging Face hub sends similarities too."""

    inputs: Inputs | SimilarityInputs = Field(  # type: ignore[assignment]  # more than its base
        description=f"{_INPUTS}, or an object of source_sentence and sentences"
    )
    parameters: SimilarityParameters | None = optional(
        "an object of truncate, truncation_direction and prompt_name, or null; with similarities"
    )

    def as_similarity(self) -> SimilarityRequest | None:
        """Return the body of ``/similarity`` where it is one; mixtures are refused."""
        inputs = self.inputs
        given = {name for name in self.model_fields_set if getattr(self, name) is not None}
        if not isinstance(inputs, SimilarityInputs):
            extra, kind = given & {"parameters"}, "texts"
        else:
            extra, kind = given - {"inputs", "parameters"}, "source_sentence and sentences"
        if extra:
            message = f"{' and '.join(sorted(extra))} cannot be sent with {kind}; leave it out"
            raise RequestError(400, message, param=min(extra))
        if not isinstance(inputs, SimilarityInputs):
            return None
        return SimilarityRequest(inputs=inputs, parameters=self.parameters)


class TokenizeRequest(Body):
    """The body of ``/tokenize``."""

    inputs: str | list[str] = Field(description="a text or a list of texts")
    add_special_tokens: bool | None = optional("a boolean: BOS and EOS as well", True)
    prompt_name: str | None = optional(_PROMPT_NAME)


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
