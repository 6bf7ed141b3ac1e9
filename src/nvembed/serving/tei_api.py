"""Text Embeddings Inference's routes, from ``/embed`` to ``/info``.

``/`` is ``/embed``, as its clients have it. ``/rerank`` gives the cosine of each text with the
query: this is an embedding model, no cross-encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from nvembed.core import __version__
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
from nvembed.serving.engine import Wish
from nvembed.serving.errors import RequestError
from nvembed.serving.inputs import (
    DIRECTION,
    INPUTS,
    PROMPT_NAME,
    TASK,
    TRUNCATE,
    Direction,
    Inputs,
    named_prompt,
    read_cut,
    read_inputs,
    read_instruction,
    read_wish,
)
from nvembed.serving.service import Service

_NUMBERS: dict[str, Any] = {"type": "array", "items": {"type": "number"}}
# Of one text; a string where they are asked for in base64.
_VECTOR: dict[str, Any] = {"anyOf": [_NUMBERS, {"type": "string"}]}
_OBJECTS: dict[str, Any] = {"type": "array", "items": {"type": "object"}}


class EmbedRequest(Body):
    """The body of ``/embed``."""

    inputs: Inputs = Field(description=INPUTS)
    normalize: bool = Field(
        default=True, description="a boolean; false leaves vectors as the pooling gives them"
    )
    truncate: bool = Field(default=True, description=TRUNCATE)
    truncation_direction: Direction = Field(default="Right", description=DIRECTION)
    prompt_name: str | None = Field(default=None, description=PROMPT_NAME)
    dimensions: int | None = Field(
        default=None, ge=1, description="an integer from 1 to the model's width, or null"
    )
    encoding_format: EncodingFormat = Field(default="float", description=ENCODING_FORMAT)
    instruction: str | None = Field(default=None, description=TASK)
    task: str | None = Field(default=None, description=f"the same as instruction: {TASK}")


class RerankRequest(Body):
    """The body of ``/rerank``."""

    query: str = Field(description="a text")
    texts: list[str] = Field(description="a list of texts")
    raw_scores: bool = Field(default=False, description="a boolean; scores are cosines either way")
    return_text: bool = Field(default=False, description="a boolean")
    truncate: bool = Field(default=True, description=TRUNCATE)
    truncation_direction: Direction = Field(default="Right", description=DIRECTION)
    instruction: str | None = Field(default=None, description=TASK)
    task: str | None = Field(default=None, description=f"the same as instruction: {TASK}")


class SimilarityInputs(Body):
    """A text and those it is compared with."""

    source_sentence: str
    sentences: list[str]


class SimilarityParameters(Body):
    """How the texts of ``/similarity`` are read."""

    truncate: bool = True
    truncation_direction: Direction = "Right"
    prompt_name: str | None = None


class SimilarityRequest(Body):
    """The body of ``/similarity``."""

    inputs: SimilarityInputs = Field(
        description="an object of source_sentence (a text) and sentences (a list of texts)"
    )
    parameters: SimilarityParameters = Field(
        default=SimilarityParameters(),
        description="an object of truncate, truncation_direction and prompt_name, or null",
    )


class TokenizeRequest(Body):
    """The body of ``/tokenize``."""

    inputs: str | list[str] = Field(description="a text or a list of texts")
    add_special_tokens: bool = Field(default=True, description="a boolean: BOS and EOS as well")
    prompt_name: str | None = Field(default=None, description=PROMPT_NAME)


def tei_routes(service: Service) -> APIRouter:
    """Build the routes of a service."""
    router = APIRouter()
    _add_embed(router, service)
    _add_comparisons(router, service)
    _add_tokens(router, service)
    return router


def _add_embed(router: APIRouter, service: Service) -> None:
    width = service.engine.dimension

    @router.post("/", **_described(EmbedRequest, _lists(_VECTOR), width))
    @router.post("/embed", **_described(EmbedRequest, _lists(_VECTOR), width))
    async def embed(request: Request) -> Response:
        body = await read_body(request, EmbedRequest)
        if body.dimensions is not None and body.dimensions > width:
            raise RequestError(
                400,
                f"{body.dimensions} dimensions asked for, the model has {width}; send at most that",
                code="bad_dimensions",
            )
        wish = read_wish(
            service.engine,
            instruction=read_instruction(body.instruction, body.task),
            prompt_name=body.prompt_name,
            cut=read_cut(body.truncate, body.truncation_direction),
            normalize=body.normalize,
        )
        vectors = await service.finish(request, _embed(service, request, [(body.inputs, wish)]))
        if body.dimensions is not None:
            short = vectors[:, : body.dimensions]
            vectors = shorten(vectors, body.dimensions) if body.normalize else short
        return await answer(embedding_rows(vectors, body.encoding_format), vectors.size)


def _add_comparisons(router: APIRouter, service: Service) -> None:
    @router.post("/rerank", **_described(RerankRequest, _OBJECTS))
    async def rerank(request: Request) -> Response:
        body = await read_body(request, RerankRequest)
        instruction = read_instruction(body.instruction, body.task)
        cut = read_cut(body.truncate, body.truncation_direction)
        query = read_wish(service.engine, instruction=instruction, side="query", cut=cut)
        documents = replace(query, side="document", task=None)
        parts: list[tuple[Inputs, Wish]] = [(body.texts, documents), ([body.query], query)]
        vectors = await service.finish(request, _embed(service, request, parts))
        scores = (vectors[:-1] @ vectors[-1]).astype(float)
        ranking = [
            {"index": row, "score": float(scores[row])}
            | ({"text": body.texts[row]} if body.return_text else {})
            for row in np.argsort(-scores, kind="stable").tolist()
        ]
        return await answer(ranking, len(ranking))

    @router.post("/similarity", **_described(SimilarityRequest, _NUMBERS))
    async def similarity(request: Request) -> Response:
        body = await read_body(request, SimilarityRequest)
        given = body.parameters
        cut = read_cut(given.truncate, given.truncation_direction)
        wish = read_wish(service.engine, prompt_name=given.prompt_name, cut=cut)
        sentences = body.inputs.sentences
        parts: list[tuple[Inputs, Wish]] = [
            (sentences, wish),
            ([body.inputs.source_sentence], wish),
        ]
        vectors = await service.finish(request, _embed(service, request, parts))
        return await answer((vectors[:-1] @ vectors[-1]).tolist(), len(sentences))


def _add_tokens(router: APIRouter, service: Service) -> None:
    @router.post("/tokenize", **_described(TokenizeRequest, _lists(_OBJECTS)))
    async def tokenize(request: Request) -> Response:
        body = await read_body(request, TokenizeRequest)
        name, engine = body.prompt_name, service.engine
        prompt = "" if name is None else named_prompt(engine, name)
        texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
        work = service.tokens(texts, prompt, special=body.add_special_tokens)
        rows = await service.finish(request, work)
        tokens = sum(map(len, rows))
        request.state.fields.update(texts=len(rows), tokens=tokens)
        return await answer(rows, 8 * tokens)

    @router.get("/info", responses=openapi_answer({"type": "object", "required": ["model_id"]}))
    async def info() -> dict[str, Any]:
        return _info(service)


def _info(service: Service) -> dict[str, Any]:
    """Describe model and limits by the names that TEI has for them."""
    engine, limits = service.engine, service.config.limits
    return {
        "model_id": service.model_name,
        "model_sha": None,
        "model_dtype": engine.dtype,
        "model_type": {"embedding": {"pooling": engine.pooling}},
        "max_concurrent_requests": limits.max_requests,
        "max_input_length": engine.max_tokens,
        "max_batch_tokens": service.config.batching.batch_tokens or engine.batch_tokens,
        "max_batch_requests": None,
        "max_client_batch_size": limits.max_texts,
        "auto_truncate": True,
        "tokenization_workers": 1,
        "version": __version__,
        "sha": None,
        "docker_label": None,
    }


def _described(
    cls: type[Body], answered: dict[str, Any], width: int | None = None
) -> dict[str, Any]:
    """Describe a route for the OpenAPI document."""
    patches = {} if width is None else {"dimensions": {"maximum": width}}
    return {
        "openapi_extra": openapi_body(cls, **patches),
        "responses": {**openapi_answer(answered), **openapi_errors(tei=True)},
    }


def _lists(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": schema}


async def _embed(
    service: Service, request: Request, parts: Sequence[tuple[Inputs, Wish]]
) -> NDArray[np.float32]:
    """Embed texts of several wishes as one request."""
    items = []
    for content, wish in parts:
        items += await read_inputs(service, content, wish, param="inputs")
    vectors = await service.embed(items, request.state.client)
    request.state.fields.update(texts=len(items), tokens=sum(item.tokens for item in items))
    return vectors
