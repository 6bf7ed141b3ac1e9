"""Request bodies: strict Pydantic models, errors that never repeat what was sent, JSON answers."""

from __future__ import annotations

import asyncio
import base64
from typing import Any, Literal, TypeVar

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from starlette.requests import Request
from starlette.responses import Response

from nvembed.serving.errors import RequestError

EncodingFormat = Literal["float", "base64"]
ENCODING_FORMAT = "'float' or 'base64' (little-endian float32)"

# Bodies and answers above it are read and written in a thread, to keep the event loop free.
_LARGE = 64 * 1024


class Body(BaseModel):
    """Base of all request bodies: unknown keys are refused, nothing is converted.

    ``null`` for a field that may be left out is the same as leaving it out.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        optional = {name for name, info in cls.model_fields.items() if not info.is_required()}
        return {k: v for k, v in data.items() if v is not None or k not in optional}


BodyT = TypeVar("BodyT", bound=Body)


async def read_body(request: Request, cls: type[BodyT]) -> BodyT:
    """Check the body of a request.

    Raises:
        RequestError: it is no JSON, or has other fields or types than ``cls`` (400).
    """
    raw = await request.body()
    try:
        if len(raw) > _LARGE:
            return await asyncio.to_thread(cls.model_validate_json, raw)
        return cls.model_validate_json(raw)
    except ValidationError as error:
        raise _bad_body(error, cls) from None


async def answer(content: object, numbers: int) -> Response:
    """Render JSON; ``numbers`` tells how large it will be."""
    if numbers * 12 > _LARGE:
        body = await asyncio.to_thread(_dump, content)
    else:
        body = _dump(content)
    return Response(body, media_type="application/json")


def embedding_rows(vectors: NDArray[np.float32], encoding: EncodingFormat) -> list[Any]:
    """Render the rows of ``(N, D)`` for JSON: as numbers, or base64 of little-endian float32."""
    if encoding == "base64":
        return [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in vectors]
    return list(np.ascontiguousarray(vectors))


def openapi_body(cls: type[Body], **patches: dict[str, Any]) -> dict[str, Any]:
    """Describe a body for the OpenAPI document; ``patches`` adds to its fields."""
    schema = cls.model_json_schema()
    inner = schema.pop("$defs", {})
    for name in schema["properties"]:
        field = schema["properties"][name]
        if "$ref" in field:  # a document of its own would need the references
            field |= inner[field.pop("$ref").rpartition("/")[2]]
        field |= patches.get(name, {})
        if name not in schema.get("required", ()):
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}]}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def openapi_errors(tei: bool) -> dict[int | str, dict[str, Any]]:
    """Describe the answers that are errors."""
    text = {"type": "string"}
    nullable = {"type": ["string", "null"]}
    inner: dict[str, Any] = {
        "type": "object",
        "required": ["message", "type", "param", "code"],
        "properties": {"message": text, "type": text, "param": nullable, "code": text},
    }
    error = text if tei else inner
    schema: dict[str, Any] = {
        "type": "object",
        "required": ["error"],
        "properties": {"error": error},
    }
    meanings = {
        400: "something in the body is wrong",
        401: "no valid API key",
        404: "unknown model",
        408: "the body came too slowly",
        413: "too large",
        415: "not JSON",
        429: "overloaded, see Retry-After",
        503: "the model failed, or out of time",
    }
    content = {"application/json": {"schema": schema}}
    return {
        status: {"description": meaning, "content": content} for status, meaning in meanings.items()
    }


def openapi_answer(schema: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    """Describe the answer that is not an error."""
    content = {"application/json": {"schema": schema}}
    return {200: {"description": "the answer", "content": content}}


def _dump(content: object) -> bytes:
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def _bad_body(error: ValidationError, cls: type[Body]) -> RequestError:
    items = error.errors(include_url=False, include_context=False, include_input=False)
    first = items[0]
    if first["type"] == "json_invalid":
        return RequestError(
            400, "the body is not valid JSON in UTF-8; check how it is built", code="invalid_json"
        )
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
    return RequestError(400, message, code="invalid_body", param=param)
