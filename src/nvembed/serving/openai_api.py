"""OpenAI's routes: ``/v1/embeddings`` and ``/v1/models``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from nvembed.encoding.outputs import shorten
from nvembed.serving.bodies import (
    ENCODING_FORMAT,
    Body,
    EncodingFormat,
    answer,
    embedding_rows,
    openapi_answer,
    openapi_body,
    openapi_errors,
    read_body,
)
from nvembed.serving.engine import Cut
from nvembed.serving.errors import RequestError
from nvembed.serving.inputs import (
    INPUTS,
    PROMPT_NAME,
    TASK,
    Inputs,
    read_inputs,
    read_instruction,
    read_wish,
)
from nvembed.serving.service import Service
from nvembed.text.instructions import Side

_SIDES: dict[str, Side] = {"query": "query", "document": "document", "passage": "document"}
_CUTS: dict[str, Cut] = {"END": "end", "START": "start", "NONE": "none"}


class EmbeddingRequest(Body):
    """The body of ``/v1/embeddings``: OpenAI's fields, NVIDIA NIM's and those of instructions."""

    input: Inputs = Field(description=INPUTS)
    model: str | None = Field(
        default=None, description="the name of a model of /v1/models, or null for the only one"
    )
    dimensions: int | None = Field(
        default=None, ge=1, description="an integer from 1 to the model's width, or null"
    )
    encoding_format: EncodingFormat = Field(default="float", description=ENCODING_FORMAT)
    user: str | None = Field(default=None, description="a text; it is not used")
    input_type: Literal["query", "document", "passage"] | None = Field(
        default=None,
        description="'query', 'document', 'passage' or null (query where there is an instruction)",
    )
    truncate: Literal["END", "START", "NONE"] = Field(
        default="END",
        description="'END' or 'START' (cut of long texts) or 'NONE' (these are refused)",
    )
    instruction: str | None = Field(default=None, description=TASK)
    task: str | None = Field(default=None, description=f"the same as instruction: {TASK}")
    prompt_name: str | None = Field(default=None, description=PROMPT_NAME)


def openai_routes(service: Service) -> APIRouter:
    """Build the routes of a service."""
    router = APIRouter(prefix="/v1")
    names, width = service.model_names, service.engine.dimension
    cards = {
        name: {"id": name, "object": "model", "created": 0, "owned_by": "nvembed"} for name in names
    }
    card = {"type": "object", "required": ["id", "object"]}

    @router.get(
        "/models", responses=openapi_answer({"type": "object", "required": ["object", "data"]})
    )
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": list(cards.values())}

    @router.get(
        "/models/{model_id:path}",
        responses={**openapi_answer(card), 404: openapi_errors(tei=False)[404]},
    )
    async def one_model(model_id: str) -> dict[str, Any]:
        _check_model(model_id, names)
        return cards[model_id]

    @router.post(
        "/embeddings",
        openapi_extra=openapi_body(
            EmbeddingRequest, model={"enum": list(names)}, dimensions={"maximum": width}
        ),
        responses={
            **openapi_answer({"type": "object", "required": ["object", "data", "model", "usage"]}),
            **openapi_errors(tei=False),
        },
    )
    async def embeddings(request: Request) -> Response:
        body = await read_body(request, EmbeddingRequest)
        if body.model is not None:
            _check_model(body.model, names)
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
        model = body.model or service.model_name
        return await answer(_listing(vectors, body, model, tokens), vectors.size)

    return router


def _check_model(given: str, names: Sequence[str]) -> None:
    if given not in names:
        raise RequestError(
            404,
            f"no model of that name here; ask for {' or '.join(map(repr, names))}",
            code="model_not_found",
            param="model",
        )


async def _embed(
    service: Service, request: Request, body: EmbeddingRequest
) -> tuple[NDArray[np.float32], int]:
    wish = read_wish(
        service.engine,
        instruction=read_instruction(body.instruction, body.task),
        prompt_name=body.prompt_name,
        side=None if body.input_type is None else _SIDES[body.input_type],
        cut=_CUTS[body.truncate],
    )
    items = await read_inputs(service, body.input, wish, param="input")
    vectors = await service.embed(items, request.state.client)
    return vectors, sum(item.tokens for item in items)


def _listing(
    vectors: NDArray[np.float32], body: EmbeddingRequest, model: str, tokens: int
) -> dict[str, Any]:
    rows = embedding_rows(vectors, body.encoding_format)
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": row}
            for index, row in enumerate(rows)
        ],
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
