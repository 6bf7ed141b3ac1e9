"""Text Embeddings Inference's routes: ``/embed``, ``/rerank`` and ``/similarity``.

``/rerank`` gives the cosine of each text with the query: this is an embedding model, no
cross-encoder. Vectors have length 1 and long texts are cut, so ``normalize`` and ``truncate`` take
``true`` only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
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
from nvembed.serving.engine import Wish
from nvembed.serving.errors import RequestError
from nvembed.serving.service import Service

_INSTRUCTION = "what the texts are for, the name of an MTEB task, or null"


class EmbedRequest(Body):
    """The body of ``/embed``."""

    inputs: str | list[str] = Field(description="a text or a list of texts")
    normalize: Literal[True] = Field(default=True, description="true: vectors have length 1")
    truncate: Literal[True] = Field(default=True, description="true: long texts are cut")
    dimensions: int | None = Field(
        default=None, ge=1, description="an integer from 1 to the model's width, or null"
    )
    instruction: str | None = Field(default=None, description=_INSTRUCTION)


class RerankRequest(Body):
    """The body of ``/rerank``."""

    query: str = Field(description="a text")
    texts: list[str] = Field(description="a list of texts")
    raw_scores: bool = Field(default=False, description="a boolean; scores are cosines either way")
    return_text: bool = Field(default=False, description="a boolean")
    truncate: Literal[True] = Field(default=True, description="true: long texts are cut")
    instruction: str | None = Field(default=None, description=_INSTRUCTION)


class SimilarityInputs(BaseModel):
    """A text and those it is compared with."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    source_sentence: str
    sentences: list[str]


class SimilarityRequest(Body):
    """The body of ``/similarity``."""

    inputs: SimilarityInputs = Field(
        description="an object of source_sentence (a text) and sentences (a list of texts)"
    )


def tei_routes(service: Service) -> APIRouter:
    """Build the routes of a service."""
    router = APIRouter()
    width = service.engine.dimension
    errors = openapi_errors(tei=True)
    numbers: dict[str, Any] = {"type": "array", "items": {"type": "number"}}

    @router.post(
        "/embed",
        openapi_extra=openapi_body(EmbedRequest, dimensions={"maximum": width}),
        responses={**openapi_answer({"type": "array", "items": numbers}), **errors},
    )
    async def embed(request: Request) -> Response:
        body = await read_body(request, EmbedRequest)
        if body.dimensions is not None and body.dimensions > width:
            raise RequestError(
                400,
                f"{body.dimensions} dimensions asked for, the model has {width}; send at most that",
                code="bad_dimensions",
            )
        texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
        task = read_instruction(body.instruction)
        wish = Wish("document" if task is None else "query", task)
        vectors = await service.finish(request, _embed(service, request, [(texts, wish)]))
        if body.dimensions is not None:
            vectors = shorten(vectors, body.dimensions)
        return await answer(list(vectors), vectors.size)

    @router.post(
        "/rerank",
        openapi_extra=openapi_body(RerankRequest),
        responses={**openapi_answer({"type": "array", "items": {"type": "object"}}), **errors},
    )
    async def rerank(request: Request) -> Response:
        body = await read_body(request, RerankRequest)
        query = Wish("query", read_instruction(body.instruction))
        parts = [(body.texts, Wish("document")), ([body.query], query)]
        vectors = await service.finish(request, _embed(service, request, parts))
        scores = (vectors[:-1] @ vectors[-1]).astype(float)
        ranking = [
            {"index": row, "score": float(scores[row])}
            | ({"text": body.texts[row]} if body.return_text else {})
            for row in np.argsort(-scores, kind="stable").tolist()
        ]
        return await answer(ranking, len(ranking))

    @router.post(
        "/similarity",
        openapi_extra=openapi_body(SimilarityRequest),
        responses={**openapi_answer(numbers), **errors},
    )
    async def similarity(request: Request) -> Response:
        body = (await read_body(request, SimilarityRequest)).inputs
        parts = [(body.sentences, Wish()), ([body.source_sentence], Wish())]
        vectors = await service.finish(request, _embed(service, request, parts))
        return await answer((vectors[:-1] @ vectors[-1]).tolist(), len(body.sentences))

    return router


async def _embed(
    service: Service, request: Request, parts: Sequence[tuple[Sequence[str], Wish]]
) -> NDArray[np.float32]:
    """Embed texts of several wishes as one request."""
    items = []
    for texts, wish in parts:
        items += await service.prepare(texts, wish, param="inputs")
    vectors = await service.embed(items, request.state.client)
    request.state.fields.update(texts=len(items), tokens=sum(item.tokens for item in items))
    return vectors
