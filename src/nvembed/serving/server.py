"""From a model's name to a listening server: what ``nvembed serve`` calls.

No CORS headers, and no page that loads anything from elsewhere.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from nvembed.core import __version__
from nvembed.core.arguments import PrecisionChoice
from nvembed.core.config import load_config
from nvembed.core.errors import ConfigError
from nvembed.core.http import address_of, bound_socket
from nvembed.model.encoder import load_encoder, set_query_prompt, settle_dtype
from nvembed.serving.config import LimitsConfig, ServerConfig
from nvembed.serving.engines import EmbedOptions, EncoderEngine, build_engine
from nvembed.serving.errors import RequestError
from nvembed.serving.middleware import ApiKeys, LimitsMiddleware, read_keys
from nvembed.serving.models import Models, Source
from nvembed.serving.routes import add_routes
from nvembed.serving.telemetry import Metrics, log_event, start_logging

_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_LOCAL = ("127.0.0.1", "::1", "localhost")


def serve(
    model: str,
    *,
    host: str,
    port: int,
    config: Path | None = None,
    overrides: Sequence[str] = (),
    keys: Path | None = None,
    dtype: PrecisionChoice | None = None,
) -> None:
    """Load a model and serve it until SIGTERM or Ctrl-C; what was accepted is finished then.

    Args:
        model: folder or hub id.
        host: address to listen on.
        port: 0 lets the system choose.
        config: YAML file of ``ServerConfig``; ``None`` is the defaults.
        overrides: ``key=value`` over it.
        keys: file of API keys; ``None`` lets everybody call who reaches the port.
        dtype: number type of the weights, see ``load_encoder``.

    Raises:
        UserError: settings, keys or model cannot be used, or the address is taken.
    """
    settings = load_config(ServerConfig, config, overrides)
    known = read_keys(keys) if keys is not None else None
    with bound_socket(host, port) as place:  # before anything is loaded
        start_logging()
        if known is None and host not in _LOCAL:
            log_event("warning", message="no --keys: everybody who reaches this address may call")
        sources = model_sources(model, settings, dtype)
        names = sources[0].names
        settings = settings.model_copy(update={"model_name": names[0], "model_aliases": names[1:]})
        run_server(sources[0].load(), settings, place, keys=known, sources=sources)


def model_sources(
    model: str, settings: ServerConfig, dtype: PrecisionChoice | None
) -> tuple[Source, ...]:
    """Return the models of a server, the first and those of its settings; none is loaded yet."""
    places = {model_names(model, settings): model}
    for name, place in settings.models.items():
        if any(name in names for names in places):
            raise ConfigError("the name of two models", where=f"models.{name}", expected="another")
        places[(name,)] = place
    import torch

    sources, threads = [], torch.get_num_threads()
    for names, place in places.items():
        settled = settle_dtype(place, dtype)  # one type for all forwards; it is there, too
        log_event("computing", model=names[0], dtype=settled or "as saved")
        sources.append(Source(names, partial(_load, place, settled, settings, threads)))
    return tuple(sources)


def _load(
    place: str, dtype: PrecisionChoice | None, settings: ServerConfig, threads: int
) -> EncoderEngine:
    import torch

    from nvembed.kernels.packed import pack_linears
    from nvembed.model.embedder import NVEmbed

    torch.set_num_threads(threads)  # a new thread starts with what another model left
    encoder = load_encoder(place, dtype)
    if isinstance(encoder, NVEmbed):
        pack_linears(encoder.backbone)  # most packs of a server are short
    if settings.task is not None and not set_query_prompt(encoder, settings.task):
        told = f"{place} was trained without instructions, its queries get none"
        log_event("warning", message=told)
    engine = build_engine(encoder, settings.batching.forwards)
    # The first forward of a process compiles and measures; no client should wait for it.
    engine.embed(engine.prepare(["warm up"], EmbedOptions()))
    return engine


def model_names(model: str, settings: ServerConfig) -> tuple[str, ...]:
    """Return the names of a model, the first for answers: from settings, its folder or hub id."""
    own = [Path(model).resolve().name] if Path(model).exists() else [model, model.split("/")[-1]]
    first = settings.model_name or own[0]
    return tuple(dict.fromkeys([first, *settings.model_aliases, *own]))


def run_server(
    engine: EncoderEngine,
    config: ServerConfig,
    place: socket.socket,
    *,
    keys: ApiKeys | None = None,
    sources: Sequence[Source] = (),
) -> None:
    """Serve an engine, and further models, until SIGTERM or Ctrl-C.

    ``place`` is an address (``bound_socket``). ``sources`` are all models by name, the first that
    of the engine; none are the engine alone.
    """
    server = build_server(engine, config, keys=keys, sources=sources)
    place.listen()  # uvicorn does so later; who reads the line below may connect at once
    # uvicorn raises the signal that stopped it once more, after all is done.
    signal.signal(signal.SIGTERM, lambda *_: None)
    address = address_of(place)
    log_event("listening", address=address, model=config.model_name, width=engine.dimension)
    del engine  # it may be unloaded
    print(f"nvembed serves {config.model_name} on {address}", file=sys.stderr, flush=True)
    server.run(sockets=[place])
    log_event("stopped")


def build_server(
    engine: EncoderEngine,
    config: ServerConfig,
    *,
    keys: ApiKeys | None = None,
    sources: Sequence[Source] = (),
    **place: Any,
) -> uvicorn.Server:
    """Put the application of an engine behind a server that does not listen yet."""
    return uvicorn.Server(
        uvicorn.Config(
            create_app(engine, config, keys, sources),
            http=partial(_LimitedConnection, config.limits),  # type: ignore[arg-type]  # is called
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws="none",
            timeout_keep_alive=config.limits.idle_seconds,
            timeout_graceful_shutdown=config.limits.shutdown_seconds,
            **place,
        )
    )


class _Connection(HttpToolsProtocol):
    """Tells the request in progress that its client is gone; uvicorn tells the last one sent."""

    _running: RequestResponseCycle | None = None

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._running is not None:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)


class _LimitedConnection(asyncio.Protocol):
    """Limits headers, connections, and the time until answers are taken, which uvicorn does not.

    Everything is handed to uvicorn's protocol, which has a new ``cycle`` once headers are whole.
    uvicorn itself closes connections that are idle between two requests; bodies have their limits
    in ``middleware.py``.
    """

    def __init__(self, limits: LimitsConfig, *, server_state: ServerState, **given: Any) -> None:
        self._limits = limits
        self._connections = server_state.connections
        self._http = _Connection(server_state=server_state, **given)
        self._deadline: asyncio.TimerHandle | None = None
        self._sending: asyncio.TimerHandle | None = None
        self._header_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._http.connection_made(transport)  # type: ignore[arg-type]  # as uvicorn narrows it
        self._http.transport.set_write_buffer_limits(0)  # any byte that is not taken is told
        if len(self._connections) > self._limits.max_connections:
            transport.close()
        else:
            self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_headers()
        self._end_sending()
        self._http.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self._http.cycle
        size = len(before.body) if before is not None else 0
        self._http.data_received(data)
        cycle = self._http.cycle
        if cycle is not before:
            self._end_headers()
            return
        if self._http.transport.is_closing():
            return
        answered = cycle is None or cycle.response_complete
        if answered:
            self._expect_headers()
        elif len(cycle.body) > size:
            return
        # Of the next request, while one is answered too, or after the last piece of a body.
        self._header_bytes += len(data)
        limit = self._limits.max_header_bytes
        if answered and cycle is not None and cycle.more_body:  # a body that was refused unread
            limit += self._limits.max_body_bytes
        if self._header_bytes > limit:
            self._refuse("431 Request Header Fields Too Large")

    def eof_received(self) -> None:
        self._http.eof_received()

    def pause_writing(self) -> None:
        self._http.pause_writing()
        self._watch_sending(None)

    def resume_writing(self) -> None:
        self._end_sending()
        self._http.resume_writing()

    def _watch_sending(self, before: int | None, looks: int = 0) -> None:
        """Cut off a client that takes nothing more: to close would be to wait for it for ever.

        Two looks, since after a pause of this process the first comes before what is sent then.
        """
        left = self._http.transport.get_write_buffer_size()
        looks = looks + 1 if left == before else 0
        if looks == 2:
            log_event("slow_client", bytes=left)
            self._http.transport.abort()
        else:
            self._sending = self._http.loop.call_later(
                self._limits.send_seconds / 2, self._watch_sending, left, looks
            )

    def _end_sending(self) -> None:
        if self._sending is not None:
            self._sending.cancel()

    def _expect_headers(self) -> None:
        if self._deadline is None:
            seconds = self._limits.header_seconds
            self._deadline = self._http.loop.call_later(
                seconds, self._refuse, "408 Request Timeout"
            )

    def _end_headers(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline, self._header_bytes = None, 0

    def _refuse(self, status: str) -> None:
        head = f"HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
        self._http.transport.write(head.encode())
        self._http.transport.close()


def create_app(
    engine: EncoderEngine,
    config: ServerConfig,
    keys: ApiKeys | None = None,
    sources: Sequence[Source] = (),
) -> FastAPI:
    """Build the application; without ``keys`` everybody may call. See ``run_server``."""
    metrics = Metrics()
    if not sources:
        names = (config.model_name or "nvembed", *config.model_aliases)
        sources = (Source(names, lambda: engine),)
    models = Models(engine, sources, config, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        models.start()
        yield
        models.close()

    app = FastAPI(
        title="nvembed",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_exception_handler(HTTPException, _answer_http)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", responses={503: {"description": "the queue is full, or it is closing"}})
    async def ready() -> JSONResponse:
        if models.ready:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "busy"}, status_code=503, headers={"retry-after": "1"})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def page() -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4")

    html = resources.files("nvembed.serving").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def docs() -> Response:  # a page over the OpenAPI document
        return HTMLResponse(html, headers=_PAGE_HEADERS)

    add_routes(app, models, config, metrics)
    routes = frozenset(app.openapi()["paths"]) | {"/openapi.json", "/docs"}
    app.add_middleware(LimitsMiddleware, config=config, keys=keys, metrics=metrics, routes=routes)
    return app


async def _answer_http(request: Request, error: Any) -> Response:
    told = {404: "no such route", 405: "this route takes another method"}.get(error.status_code)
    message = f"{told}; see /openapi.json" if told else str(error.detail)
    response = RequestError(error.status_code, message, "no_route").response(request.url.path)
    response.headers.update(error.headers or {})
    return response
