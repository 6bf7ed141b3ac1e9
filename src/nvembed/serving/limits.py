"""The gate in front of every route: keys, sizes, numbers, times; then metrics and the log line.

Plain ASGI, so that a request is refused before its body is read and memory stays bounded: at most
``max_requests`` bodies of ``max_inflight_bytes`` together are held at any time. Compressed bodies
count as what they hold.
"""

from __future__ import annotations

import asyncio
import time
import traceback
import uuid
from dataclasses import dataclass, field
from itertools import chain

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nvembed.serving.compression import body_unpacker
from nvembed.serving.config import LimitsConfig, ServerConfig
from nvembed.serving.errors import RequestError
from nvembed.serving.keys import ApiKeys
from nvembed.serving.logs import log_event
from nvembed.serving.metrics import Metrics
from nvembed.serving.service import ClientGoneError

# Answered without a key, and however busy the server is: they ask how it is.
OPEN_PATHS = ("/health", "/ready", "/openapi.json")


@dataclass(slots=True)
class _Visit:
    """What is known of one request, for the log."""

    path: str
    request_id: str
    client: str
    start: float
    status: int | None = None
    held_bytes: int = 0
    state: dict[str, object] = field(default_factory=dict)


class Gate:
    """ASGI middleware; see the module.

    Args:
        app: what is behind it.
        config: all settings.
        keys: who may call; ``None`` is everybody.
        metrics: where requests are counted.
        routes: the paths that exist; any other is counted as "other".
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        config: ServerConfig,
        keys: ApiKeys | None,
        metrics: Metrics,
        routes: frozenset[str],
    ) -> None:
        self._app = app
        self._limits: LimitsConfig = config.limits
        self._log = config.log_requests
        self._keys = keys
        self._metrics = metrics
        self._routes = routes
        self._inflight = 0
        self._inflight_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # "/embed/" is "/embed": clients join addresses in either way.
        scope = {**scope, "path": scope["path"].rstrip("/") or "/"}
        peer = scope.get("client")
        visit = _Visit(
            scope["path"], uuid.uuid4().hex, peer[0] if peer else "local", time.perf_counter()
        )
        watched = self._watched(send, visit)
        self._inflight += 1
        self._metrics.inflight.set(self._inflight)
        try:
            await self._admit(scope, receive, watched, visit)
        except ClientGoneError:
            visit.status = visit.status or 499  # for metrics and log; nobody reads it
        except RequestError as error:
            self._metrics.rejected.labels(error.code).inc()
            await _refuse(watched, error, visit)
        except _SendTimeoutError:
            log_event("slow_client", request=visit.request_id)
            raise
        except Exception as error:  # a bug: told without a traceback, which could hold texts
            where = traceback.extract_tb(error.__traceback__)[-1]
            log_event(
                "bug",
                request=visit.request_id,
                error=type(error).__name__,
                where=f"{where.filename}:{where.lineno}",
            )
            if visit.status is not None:
                raise
            fault = RequestError(503, "a fault of the server", code="internal_error")
            await _refuse(watched, fault, visit)
        finally:
            self._inflight -= 1
            self._inflight_bytes -= visit.held_bytes
            self._metrics.inflight.set(self._inflight)
            self._note(scope, visit)

    async def _admit(self, scope: Scope, receive: Receive, send: Send, visit: _Visit) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if visit.path not in OPEN_PATHS:
            if self._keys is not None:
                owner = self._keys.owner(headers.get(b"authorization"))
                if owner is None:
                    raise RequestError(
                        401,
                        "no valid API key; send the header 'Authorization: Bearer KEY'",
                        code="invalid_api_key",
                    )
                visit.client = owner
            if self._inflight > self._limits.max_requests:
                raise _too_busy()
        scope.setdefault("state", {})["client"] = visit.client
        scope["state"]["fields"] = visit.state
        if scope["method"] == "POST" and visit.path in self._routes:
            body = await self._read_body(headers, receive, visit)
            receive = _replay(body, receive)
        await self._app(scope, receive, send)

    async def _read_body(self, headers: dict[bytes, str], receive: Receive, visit: _Visit) -> bytes:
        kind = headers.get(b"content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RequestError(
                415, "send the header 'Content-Type: application/json'", code="content_type"
            )
        unpack = body_unpacker(headers.get(b"content-encoding", ""))
        declared = headers.get(b"content-length", "")
        if declared.isdecimal() and int(declared) > self._limits.max_body_bytes:
            raise self._too_large()
        parts: list[bytes] = []
        sent = size = 0
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError
                    part = message.get("body", b"")
                    sent += len(part)
                    more = message.get("more_body", False)
                    for piece in chain(unpack(part), () if more else unpack(b"")):
                        size += len(piece)
                        self._hold(len(piece), visit, max(sent, size))
                        parts.append(piece)
                        if size > sent:  # a few bytes may hold many: others take turns
                            await asyncio.sleep(0)
                    self._hold(0, visit, sent)
                    if not more:
                        return b"".join(parts)
        except TimeoutError as error:
            raise RequestError(
                408,
                f"the body did not arrive within {self._limits.body_seconds:g} seconds",
                code="slow_body",
            ) from error

    def _hold(self, more: int, visit: _Visit, size: int) -> None:
        """Count bytes of a body that are held from now on; ``size`` is what it has so far."""
        if size > self._limits.max_body_bytes:
            raise self._too_large()
        if self._inflight_bytes + more > self._limits.max_inflight_bytes:
            raise _too_busy()
        self._inflight_bytes += more
        visit.held_bytes += more

    def _too_large(self) -> RequestError:
        return RequestError(
            413,
            f"the body is larger than {self._limits.max_body_bytes} bytes; send several requests",
            code="body_too_large",
        )

    def _watched(self, send: Send, visit: _Visit) -> Send:
        seconds = self._limits.send_seconds

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", visit.request_id.encode()),
                ]
            try:
                async with asyncio.timeout(seconds):
                    await send(message)
            except TimeoutError as error:
                raise _SendTimeoutError from error

        return watched

    def _note(self, scope: Scope, visit: _Visit) -> None:
        seconds = time.perf_counter() - visit.start
        route = visit.path if visit.path in self._routes else "other"
        self._metrics.requests.labels(route, str(visit.status)).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        if self._log and route not in OPEN_PATHS:
            log_event(
                "request",
                request=visit.request_id,
                client=visit.client,
                method=scope["method"],
                route=route,
                status=visit.status,
                ms=round(1000 * seconds, 1),
                bytes=visit.held_bytes,
                **{name: int(str(value)) for name, value in visit.state.items()},
            )


class _SendTimeoutError(Exception):
    """The client does not read its answer."""


def _too_busy() -> RequestError:
    return RequestError(
        429,
        "too many requests are under way; send this one again after Retry-After seconds",
        code="overloaded",
        retry_seconds=1,
    )


def _replay(body: bytes, receive: Receive) -> Receive:
    """Hand out a body that was read already, then what the connection says."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _refuse(send: Send, error: RequestError, visit: _Visit) -> None:
    body = orjson.dumps(error.body(visit.path))
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **error.headers(),
    }
    if error.status in (408, 413):
        headers["connection"] = "close"  # the rest of the body is not read
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
