"""The table of routes, and what the OpenAPI document says of each.

``/`` is ``/embed``, as TEI's clients have it, and ``/similarity``.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import orjson
from fastapi import FastAPI
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from nvembed.serving import handlers, vendor_handlers
from nvembed.serving.bodies import (
    LARGE_BYTES,
    Body,
    EmbedRequest,
    OpenAIRequest,
    RerankRequest,
    RootRequest,
    SimilarityRequest,
    TokenizeRequest,
    read_body,
)
from nvembed.serving.config import ServerConfig
from nvembed.serving.engines import Token
from nvembed.serving.errors import Api, api_of
from nvembed.serving.middleware import RequestContext
from nvembed.serving.models import Models
from nvembed.serving.service import Service, finish
from nvembed.serving.telemetry import Metrics
from nvembed.serving.vendor_bodies import (
    CohereEmbedRequest,
    OllamaEmbedRequest,
    OllamaPromptRequest,
    OllamaShowRequest,
    RankRequest,
)

_Handler = Callable[[Service, Any, RequestContext], Coroutine[Any, Any, handlers.Answer]]


@dataclass(frozen=True)
class _Route:
    """A route that reads a body."""

    path: str
    body: type[Body]
    handler: _Handler
    answered: object  # the type of its answer in the OpenAPI document


_Vectors = list[list[float] | str]  # a string is base64
_Ranking = list[dict[str, Any]]


class _Embeddings(BaseModel):
    object: str
    data: list[dict[str, Any]]
    model: str
    usage: dict[str, int]


class _CohereEmbeddings(BaseModel):
    id: str
    response_type: str
    embeddings: dict[str, _Vectors]
    texts: list[str]
    meta: dict[str, Any]


class _Ranked(BaseModel):
    id: str
    model: str
    object: str
    results: list[dict[str, Any]]
    usage: dict[str, int]
    meta: dict[str, Any]


class _OllamaVectors(BaseModel):
    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class _OllamaVector(BaseModel):
    embedding: list[float]


ROUTES = (
    _Route("/v1/embeddings", OpenAIRequest, handlers.embeddings, _Embeddings),
    _Route("/", RootRequest, handlers.root, _Vectors | list[float]),
    _Route("/embed", EmbedRequest, handlers.embed, _Vectors),
    _Route("/rerank", RerankRequest, handlers.rerank, _Ranking),
    _Route("/similarity", SimilarityRequest, handlers.similarity, list[float]),
    _Route("/tokenize", TokenizeRequest, handlers.tokenize, list[list[Token]]),
    _Route("/v2/embed", CohereEmbedRequest, vendor_handlers.cohere_embed, _CohereEmbeddings),
    _Route("/v1/rerank", RankRequest, vendor_handlers.rank, _Ranked),
    _Route("/v2/rerank", RankRequest, vendor_handlers.rank, _Ranked),
    _Route("/api/embed", OllamaEmbedRequest, vendor_handlers.ollama_embed, _OllamaVectors),
    _Route("/api/embeddings", OllamaPromptRequest, vendor_handlers.ollama_prompt, _OllamaVector),
    _Route("/api/show", OllamaShowRequest, vendor_handlers.ollama_show, dict[str, Any]),
)


def add_routes(app: FastAPI, models: Models, config: ServerConfig, metrics: Metrics) -> None:
    """Add the routes of all APIs."""

    async def answer(
        request: Request, name: str | None, handler: _Handler, body: Body | None
    ) -> Response:
        async def work() -> handlers.Answer:
            async with models.using(name) as service:
                return await handler(service, body, request.state.context)

        seconds = config.limits.request_seconds
        content, numbers = await finish(request, work(), seconds, metrics)
        if numbers * 12 > LARGE_BYTES:
            rendered = await asyncio.to_thread(_dump, content)
        else:
            rendered = _dump(content)
        return Response(rendered, media_type="application/json")

    for route in ROUTES:
        _add_post(app, models, route, answer)

    cards = {
        name: {"id": name, "object": "model", "created": 0, "owned_by": "nvembed"}
        for name in models.names
    }

    @app.get("/v1/models")
    async def all_models() -> dict[str, Any]:
        return {"object": "list", "data": list(cards.values())}

    @app.get("/v1/models/{model_id:path}", responses={404: _described_errors("/v1")[404]})
    async def one_model(model_id: str) -> dict[str, Any]:
        models.find(model_id)
        return cards[model_id]

    @app.get("/api/tags")
    async def ollama_tags() -> dict[str, Any]:
        return vendor_handlers.ollama_tags(models.names)

    @app.get("/info", responses={200: {"model": dict[str, Any]}})
    async def info(request: Request) -> Response:
        return await answer(request, None, handlers.info, None)


def _add_post(
    app: FastAPI,
    models: Models,
    row: _Route,
    answer: Callable[..., Coroutine[Any, Any, Response]],
) -> None:
    async def route(request: Request) -> Response:
        body = await read_body(request.state.context.body, row.body)
        name: str | None = getattr(body, "model", None)
        if name is not None and api_of(row.path) == "ollama":
            name = name.removesuffix(vendor_handlers.LATEST)
        return await answer(request, name, row.handler, body)

    width: dict[str, Any] = {} if models.width is None else {"maximum": models.width}
    patches = {
        "model": {"enum": list(models.names)},
        "dimensions": width,
        "output_dimension": width,
    }
    app.post(
        row.path,
        name=row.handler.__name__,
        openapi_extra=_described_body(row.body, patches),
        responses={200: {"model": row.answered}, **_described_errors(row.path)},
    )(route)


def _dump(content: object) -> bytes:
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


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
    for name in patches.keys() & schema["properties"].keys():
        schema["properties"][name]["anyOf"][0] |= patches[name]  # the other one is null
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


class _CohereError(BaseModel):
    message: str


class _OllamaError(BaseModel):
    error: str


_ERROR_MODELS: dict[Api, type[BaseModel]] = {
    "openai": _OpenAIError,
    "tei": _TEIError,
    "cohere": _CohereError,
    "ollama": _OllamaError,
}


def _described_errors(path: str) -> dict[int | str, dict[str, Any]]:
    model = _ERROR_MODELS[api_of(path)]
    return {status: {"description": told, "model": model} for status, told in _ERRORS.items()}
