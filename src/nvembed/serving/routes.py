"""The routes: OpenAI's ``/v1/embeddings`` and ``/v1/models``, TEI's from ``/embed`` to ``/info``.

``/`` is ``/embed``, as TEI's clients have it. ``/rerank`` gives the cosine of each text with the
query: this is an embedding model, no cross-encoder. What the OpenAPI document says of a route
stands at the end.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import orjson
from fastapi import FastAPI
from numpy.typing import NDArray
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from nvembed.core import __version__
from nvembed.encoding.encoder import unit_rows
from nvembed.serving.bodies import (
    LARGE_BYTES,
    Body,
    EmbedRequest,
    OpenAIRequest,
    RerankRequest,
    SimilarityParameters,
    SimilarityRequest,
    TokenizeRequest,
    VectorFields,
    read_body,
)
from nvembed.serving.engines import Token
from nvembed.serving.errors import TEI_PATHS, RequestError
from nvembed.serving.middleware import RequestContext
from nvembed.serving.service import Inputs, Service

_Answer = tuple[object, int]
"""What is rendered as JSON, and about how many numbers it has."""
_Handler = Callable[[Service, Any, RequestContext], Coroutine[Any, Any, _Answer]]


def add_routes(app: FastAPI, service: Service) -> None:
    """Add the routes of both APIs."""
    names = {"enum": list(service.model_names)}
    widths = {"maximum": service.engine.dimension}
    post = partial(_add_post, app, service)
    post("/v1/embeddings", OpenAIRequest, embeddings, _Embeddings, model=names, dimensions=widths)
    post("/", EmbedRequest, embed, _Vectors, dimensions=widths)
    post("/embed", EmbedRequest, embed, _Vectors, dimensions=widths)
    post("/rerank", RerankRequest, rerank, list[dict[str, Any]])
    post("/similarity", SimilarityRequest, similarity, list[float])
    post("/tokenize", TokenizeRequest, tokenize, list[list[Token]])

    cards = {
        name: {"id": name, "object": "model", "created": 0, "owned_by": "nvembed"}
        for name in service.model_names
    }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": list(cards.values())}

    @app.get("/v1/models/{model_id:path}", responses={404: _described_errors("/v1")[404]})
    async def one_model(model_id: str) -> dict[str, Any]:
        _check_model(service, model_id)
        return cards[model_id]

    @app.get("/info")
    async def info() -> dict[str, Any]:
        return _info(service)


def _add_post(
    app: FastAPI,
    service: Service,
    path: str,
    cls: type[Body],
    handler: _Handler,
    answered: object,
    **patches: dict[str, Any],
) -> None:
    """Add a route that reads a body; ``patches`` adds to its fields in the OpenAPI document."""

    async def route(request: Request) -> Response:
        context: RequestContext = request.state.context
        work = handler(service, await read_body(context.body, cls), context)
        content, numbers = await service.finish(request, work)
        if numbers * 12 > LARGE_BYTES:
            rendered = await asyncio.to_thread(_dump, content)
        else:
            rendered = _dump(content)
        return Response(rendered, media_type="application/json")

    app.post(
        path,
        name=handler.__name__,
        openapi_extra=_described_body(cls, patches),
        responses={200: {"model": answered}, **_described_errors(path)},
    )(route)


async def embeddings(service: Service, body: OpenAIRequest, context: RequestContext) -> _Answer:
    """Answer ``/v1/embeddings``."""
    if body.model is not None:
        _check_model(service, body.model)
    input_type = "document" if body.input_type == "passage" else body.input_type
    how = {"input_type": input_type, "cut": (body.truncate or "END").lower()}
    vectors = await _vectors(service, body.input, body, context, **how)
    data = [
        {"object": "embedding", "index": index, "embedding": row}
        for index, row in enumerate(_rows(vectors, body))
    ]
    usage = {"prompt_tokens": context.tokens, "total_tokens": context.tokens}
    model = body.model or service.model_name
    return {"object": "list", "data": data, "model": model, "usage": usage}, vectors.size


async def embed(service: Service, body: EmbedRequest, context: RequestContext) -> _Answer:
    """Answer ``/embed``."""
    how = {"cut": body.cut, "normalize": body.normalize is not False}
    vectors = await _vectors(service, body.inputs, body, context, **how)
    return _rows(vectors, body), vectors.size


async def rerank(service: Service, body: RerankRequest, context: RequestContext) -> _Answer:
    """Answer ``/rerank``."""
    instruction = body.given_instruction()
    query = service.read_options(instruction=instruction, input_type="query", cut=body.cut)
    documents = replace(query, input_type="document", task=None)
    vectors = await service.embed([(body.texts, documents), ([body.query], query)], context)
    scores = (vectors[:-1] @ vectors[-1]).astype(float)
    ranking = [
        {"index": row, "score": float(scores[row])}
        | ({"text": body.texts[row]} if body.return_text else {})
        for row in np.argsort(-scores, kind="stable").tolist()
    ]
    return ranking, len(ranking)


async def similarity(service: Service, body: SimilarityRequest, context: RequestContext) -> _Answer:
    """Answer ``/similarity``."""
    given, inputs = body.parameters or SimilarityParameters(), body.inputs
    options = service.read_options(prompt_name=given.prompt_name, cut=given.cut)
    parts: list[tuple[Inputs, Any]] = [
        (inputs.sentences, options),
        ([inputs.source_sentence], options),
    ]
    vectors = await service.embed(parts, context)
    return (vectors[:-1] @ vectors[-1]).tolist(), len(inputs.sentences)


async def tokenize(service: Service, body: TokenizeRequest, context: RequestContext) -> _Answer:
    """Answer ``/tokenize``."""
    prompt = "" if body.prompt_name is None else service.named_prompt(body.prompt_name)
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    special = body.add_special_tokens is not False
    rows = await service.tokens(texts, prompt, special, context)
    return rows, 8 * sum(map(len, rows))


async def _vectors(
    service: Service, content: Inputs, body: VectorFields, context: RequestContext, **how: Any
) -> NDArray[np.float32]:
    width = service.engine.dimension
    if body.dimensions is not None and body.dimensions > width:
        message = f"{body.dimensions} dimensions asked for, the model has {width}"
        message = f"{message}; send at most that"
        raise RequestError(400, message, "bad_dimensions", param="dimensions")
    instruction = body.given_instruction()
    options = service.read_options(instruction=instruction, prompt_name=body.prompt_name, **how)
    vectors = await service.embed([(content, options)], context)
    if body.dimensions is None:
        return vectors
    short = vectors[:, : body.dimensions]
    return unit_rows(short) if options.normalize else short


def _rows(vectors: NDArray[np.float32], body: VectorFields) -> list[Any]:
    """Render the rows of ``(N, D)``: as numbers, or base64 of little-endian float32."""
    if body.encoding_format == "base64":
        return [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in vectors]
    return list(np.ascontiguousarray(vectors))


def _dump(content: object) -> bytes:
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def _check_model(service: Service, given: str) -> None:
    if given not in service.model_names:
        names = " or ".join(map(repr, service.model_names))
        message = f"no model of that name here; ask for {names}"
        raise RequestError(404, message, "model_not_found", param="model")


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
        "max_batch_tokens": service.batch_tokens,
        "max_batch_requests": None,
        "max_client_batch_size": limits.max_texts,
        "auto_truncate": True,
        "tokenization_workers": 1,
        "version": __version__,
        "sha": None,
        "docker_label": None,
    }


# --- The OpenAPI document -------------------------------------------------------------------------

_ERRORS = {
    400: "something in the body is wrong",
    401: "no valid API key",
    404: "unknown model",
    408: "the body came too slowly",
    413: "too large",
    415: "not JSON",
    429: "overloaded, see Retry-After",
    503: "the model failed, or out of time",
}


_Vectors = list[list[float] | str]  # a string is base64


class _Embeddings(BaseModel):
    object: str
    data: list[dict[str, Any]]
    model: str
    usage: dict[str, int]


class _OpenAIError(BaseModel):
    error: dict[str, str | None]  # message, type, param and code


class _TEIError(BaseModel):
    error: str
    error_type: str


def _described_body(cls: type[Body], patches: dict[str, dict[str, Any]]) -> dict[str, Any]:
    schema = cls.model_json_schema()
    inner = schema.pop("$defs", {})
    text = json.dumps(schema)
    for name, definition in inner.items():  # these references would be of a document of its own
        text = text.replace(f'"$ref": "#/$defs/{name}"', json.dumps(definition)[1:-1])
    schema = json.loads(text)
    for name, patch in patches.items():
        schema["properties"][name]["anyOf"][0] |= patch  # the other one is null
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _described_errors(path: str) -> dict[int | str, dict[str, Any]]:
    model = _TEIError if path in TEI_PATHS else _OpenAIError
    return {status: {"description": told, "model": model} for status, told in _ERRORS.items()}
