"""OpenAI's routes: ``/v1/embeddings`` and ``/v1/models``."""

from __future__ import annotations

import base64
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from nvembed.inference.outputs import shorten
from nvembed.serving.bodies import (
    Body,
    answer,
    openapi_answer,
    openapi_body,
    openapi_errors,
    read_body,
    read_instruction,
)
from nvembed.serving.engine import Item, Side, Wish
from nvembed.serving.errors import RequestError
from nvembed.serving.service import Service


class EmbeddingRequest(Body):
    """The body of ``/v1/embeddings``: OpenAI's, and two fields for models with instructions."""

    input: str | list[str] | list[int] | list[list[int]] = Field(
        description="a text, a list of texts, a list of token ids, or a list of such lists"
    )
    model: str = Field(description="the name of a model of /v1/models")
    dimensions: int | None = Field(
        default=None, ge=1, description="an integer from 1 to the model's width, or null"
    )
    encoding_format: Literal["float", "base64"] = Field(
        default="float", description="'float' or 'base64' (little-endian float32)"
    )
    user: str | None = Field(default=None, description="a text; it is not used")
    input_type: Literal["query", "document"] | None = Field(
        default=None,
        description="'query', 'document' or null (query where there is an instruction)",
    )
    instruction: str | None = Field(
        default=None, description="what the texts are for, the name of an MTEB task, or null"
    )


def openai_routes(service: Service) -> APIRouter:
    """Build the routes of a service."""
    router = APIRouter(prefix="/v1")
    name, width = service.model_name, service.engine.dimension
    model = {"id": name, "object": "model", "created": 0, "owned_by": "nvembed"}
    card = {"type": "object", "required": ["id", "object"]}

    @router.get(
        "/models", responses=openapi_answer({"type": "object", "required": ["object", "data"]})
    )
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @router.get(
        "/models/{model_id:path}",
        responses={**openapi_answer(card), 404: openapi_errors(tei=False)[404]},
    )
    async def one_model(model_id: str) -> dict[str, Any]:
        _check_model(model_id, name)
        return model

    @router.post(
        "/embeddings",
        openapi_extra=openapi_body(
            EmbeddingRequest, model={"enum": [name]}, dimensions={"maximum": width}
        ),
        responses={
            **openapi_answer({"type": "object", "required": ["object", "data", "model", "usage"]}),
            **openapi_errors(tei=False),
        },
    )
    async def embeddings(request: Request) -> Response:
        body = await read_body(request, EmbeddingRequest)
        _check_model(body.model, name)
        if body.dimensions is not None and body.dimensions > width:
            raise RequestError(
                400,
                f"{body.dimensions} dimensions asked for, the model has {width}; send at most that",
                code="bad_dimensions",
                param="dimensions",
            )
        vectors, tokens = await service.finish(request, _embed(service, request, body))
        request.state.fields.update(texts=len(vectors), tokens=tokens)
        if body.dimensions is not None:
            vectors = shorten(vectors, body.dimensions)
        return await answer(_listing(vectors, body, tokens), vectors.size)

    return router


def _check_model(given: str, name: str) -> None:
    if given != name:
        raise RequestError(
            404,
            f"no model of that name here; ask for {name!r}",
            code="model_not_found",
            param="model",
        )


async def _embed(
    service: Service, request: Request, body: EmbeddingRequest
) -> tuple[NDArray[np.float32], int]:
    items = await _items(service, body)
    vectors = await service.embed(items, request.state.client)
    return vectors, sum(item.tokens for item in items)


async def _items(service: Service, body: EmbeddingRequest) -> list[Item]:
    task = read_instruction(body.instruction)
    side: Side = body.input_type or ("document" if task is None else "query")
    content = body.input
    if isinstance(content, str):
        return await service.prepare([content], Wish(side, task), param="input")
    if not content or isinstance(content[0], str):
        texts = [text for text in content if isinstance(text, str)]
        return await service.prepare(texts, Wish(side, task), param="input")
    if task is not None or body.input_type == "query":
        raise RequestError(
            400,
            "token ids are embedded as documents, bare; send texts with an instruction",
            code="ids_with_instruction",
            param="instruction",
        )
    single = [value for value in content if isinstance(value, int)]
    rows = [single] if single else [row for row in content if isinstance(row, list)]
    return await service.prepare_ids(rows, param="input")


def _listing(vectors: NDArray[np.float32], body: EmbeddingRequest, tokens: int) -> dict[str, Any]:
    rows: list[Any] = list(vectors)
    if body.encoding_format == "base64":
        rows = [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in vectors]
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": row}
            for index, row in enumerate(rows)
        ],
        "model": body.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
