"""The application: an engine behind OpenAI's and TEI's routes, health and metrics.

No CORS headers, no pages that load scripts from elsewhere: the OpenAPI document alone.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from nvembed.core import __version__
from nvembed.serving.config import ServerConfig
from nvembed.serving.engine import Engine
from nvembed.serving.errors import RequestError
from nvembed.serving.keys import ApiKeys
from nvembed.serving.limits import Gate
from nvembed.serving.metrics import Metrics
from nvembed.serving.openai_api import openai_routes
from nvembed.serving.service import Service
from nvembed.serving.tei_api import tei_routes


def create_app(engine: Engine, config: ServerConfig, keys: ApiKeys | None = None) -> FastAPI:
    """Build the application of one model.

    Args:
        engine: the model, loaded.
        config: all settings.
        keys: who may call; ``None`` is everybody.
    """
    metrics = Metrics()
    service = Service(engine, config, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.close()

    app = FastAPI(
        title="nvembed",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_exception_handler(RequestError, _answer_refusal)
    app.add_exception_handler(HTTPException, _answer_http)
    _add_state_routes(app, service)
    app.include_router(openai_routes(service))
    app.include_router(tei_routes(service))
    routes = frozenset(app.openapi()["paths"]) | {"/openapi.json"}
    app.add_middleware(Gate, config=config, keys=keys, metrics=metrics, routes=routes)
    return app


def _add_state_routes(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", responses={503: {"description": "the queue is full, or it is closing"}})
    async def ready() -> JSONResponse:
        if service.batcher.ready:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "busy"}, status_code=503, headers={"retry-after": "1"})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4")


async def _answer_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    content = error.body(request.url.path)
    return JSONResponse(content, status_code=error.status, headers=error.headers())


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {
        404: "no such route; see /openapi.json",
        405: "this route takes another method; see /openapi.json",
    }.get(error.status_code, str(error.detail))
    refusal = RequestError(error.status_code, message, code="no_route")
    headers = {**(error.headers or {}), **refusal.headers()}
    content = refusal.body(request.url.path)
    return JSONResponse(content, status_code=error.status_code, headers=headers)
