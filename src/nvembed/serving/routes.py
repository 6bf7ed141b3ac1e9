"""The table of routes, and what the OpenAPI document says of each.

``/`` is ``/embed``, as TEI's clients have it, and ``/similarity``.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple, get_type_hints

import orjson
from fastapi import FastAPI
from pydantic import BaseModel, create_model
from starlette.requests import Request
from starlette.responses import Response

from nvembed.serving import handlers, vendor_handlers
from nvembed.serving.bodies import LARGE_BYTES, Body, read_body
from nvembed.serving.config import ServerConfig
from nvembed.serving.engines import Token
from nvembed.serving.errors import Api, api_of
from nvembed.serving.middleware import RequestContext
from nvembed.serving.models import Models
from nvembed.serving.service import Service, finish
from nvembed.serving.telemetry import Metrics

_Handler = Callable[[Service, Any, RequestContext], Coroutine[Any, Any, handlers.Answer]]


class _Route(NamedTuple):
    """A route that reads a body, of the type that its handler takes."""

    path: str
    handler: _Handler
    answered: object  # the type of its answer in the OpenAPI document


def _object(name: str, **fields: object) -> type[BaseModel]:
    """The form of an object in the OpenAPI document."""
    definitions: dict[str, Any] = {field: (kind, ...) for field, kind in fields.items()}
    return create_model(name, **definitions)


_Vectors = list[list[float] | str]  # a string is base64
_Numbers = list[float]
_Objects, _Object = list[dict[str, Any]], dict[str, Any]
_Usage, _ByType, _Texts = dict[str, int], dict[str, _Vectors], list[str]
_EMBEDDINGS = _object("_Embeddings", object=str, data=_Objects, model=str, usage=_Usage)
_COHERE = _object(
    "_CohereEmbeddings", id=str, response_type=str, embeddings=_ByType, texts=_Texts, meta=_Object
)
_RANKED = _object(
    "_Ranked", id=str, model=str, object=str, results=_Objects, usage=_Usage, meta=_Object
)
_COUNTS = dict.fromkeys(("total_duration", "load_duration", "prompt_eval_count"), int)
_OLLAMA = _object("_OllamaVectors", model=str, embeddings=list[_Numbers], **_COUNTS)
_OLLAMA_OLD = _object("_OllamaVector", embedding=_Numbers)

ROUTES = (
    _Route("/v1/embeddings", handlers.embeddings, _EMBEDDINGS),
    _Route("/", handlers.root, _Vectors | _Numbers),
    _Route("/embed", handlers.embed, _Vectors),
    _Route("/rerank", handlers.rerank, _Objects),
    _Route("/similarity", handlers.similarity, _Numbers),
    _Route("/tokenize", handlers.tokenize, list[list[Token]]),
    _Route("/v2/embed", vendor_handlers.cohere_embed, _COHERE),
    _Route("/v1/rerank", vendor_handlers.rank, _RANKED),
    _Route("/v2/rerank", vendor_handlers.rank, _RANKED),
    _Route("/api/embed", vendor_handlers.ollama_embed, _OLLAMA),
    _Route("/api/embeddings", vendor_handlers.ollama_prompt, _OLLAMA_OLD),
    _Route("/api/show", vendor_handlers.ollama_show, _Object),
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
    form: type[Body] = get_type_hints(row.handler)["body"]

    async def route(request: Request) -> Response:
        body = await read_body(request.state.context.body, form)
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
        openapi_extra=_described_body(form, patches),
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


_ERROR_MODELS: dict[Api, type[BaseModel]] = {
    "openai": _object("_OpenAIError", error=dict[str, str | None]),
    "tei": _object("_TEIError", error=str, error_type=str),
    "cohere": _object("_CohereError", message=str),
    "ollama": _object("_OllamaError", error=str),
}


def _described_errors(path: str) -> dict[int | str, dict[str, Any]]:
    model = _ERROR_MODELS[api_of(path)]
    return {status: {"description": told, "model": model} for status, told in _ERRORS.items()}
