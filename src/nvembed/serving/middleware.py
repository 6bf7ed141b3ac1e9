"""In front of every route: keys, sizes, numbers and times, then metrics and the log line.

Plain ASGI, so that a request is refused before its body is read and memory stays bounded: at most
``max_requests`` bodies of ``max_inflight_bytes`` together are held at any time. A compressed body
is unpacked piece by piece, since a few kilobytes of gzip can hold gigabytes.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import hmac
import io
import time
import traceback
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nvembed.core.errors import ConfigError
from nvembed.serving.config import ServerConfig
from nvembed.serving.errors import ClientGoneError, RequestError
from nvembed.serving.telemetry import Metrics, log_event

# Answered without a key, and however busy the server is.
OPEN_PATHS = ("/health", "/ready", "/openapi.json", "/docs")
PIECE_BYTES = 64 * 1024
MIN_KEY_CHARS = 16


@dataclass(slots=True)
class RequestContext:
    """What is known of one request, for its route (``request.state.context``) and the log."""

    path: str
    client: str
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    start: float = field(default_factory=time.perf_counter)
    status: int | None = None
    held_bytes: int = 0
    body: bytearray = field(default_factory=bytearray)  # unpacked
    texts: int | None = None
    tokens: int | None = None


class LimitsMiddleware:
    """See the module; paths that are not among ``routes`` are counted as "other"."""

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
        self._limits = config.limits
        self._log = config.log_requests
        self._keys = keys
        self._metrics = metrics
        self._routes = routes
        self._inflight = 0
        self._inflight_bytes = 0
        metrics.inflight.set_function(lambda: self._inflight)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].rstrip("/") or "/"  # clients join addresses in either way
        context = RequestContext(path, scope["client"][0] if scope.get("client") else "local")
        state = {**scope.get("state", {}), "context": context}
        scope = {**scope, "path": path, "state": state}
        send = self._watched(send, context)
        self._inflight += 1
        try:
            try:
                await self._admit(scope, receive, context)
            except RequestError as error:
                self._metrics.rejected.labels(error.code).inc()
                raise
            await self._app(scope, receive, send)
        except ClientGoneError:
            context.status = context.status or 499  # for metrics and log; nobody reads it
        except RequestError as error:
            await error.response(path)(scope, receive, send)
        except Exception as error:  # a bug: told without a traceback, which could hold texts
            where = traceback.extract_tb(error.__traceback__)[-1]
            place, name = f"{where.filename}:{where.lineno}", type(error).__name__
            log_event("bug", request=context.request_id, error=name, where=place)
            if context.status is not None:
                raise
            fault = RequestError(503, "a fault of the server", "internal_error")
            await fault.response(path)(scope, receive, send)
        finally:
            self._inflight -= 1
            self._inflight_bytes -= context.held_bytes
            self._note(scope["method"], context)

    async def _admit(self, scope: Scope, receive: Receive, context: RequestContext) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if context.path not in OPEN_PATHS:
            if self._keys is not None:
                owner = self._keys.owner(headers.get(b"authorization"))
                if owner is None:
                    message = "no valid API key; send the header 'Authorization: Bearer KEY'"
                    raise RequestError(401, message, "invalid_api_key")
                context.client = owner
            if self._inflight > self._limits.max_requests:
                raise _too_busy()
        if scope["method"] == "POST" and context.path in self._routes:
            await self._read_body(headers, receive, context)

    async def _read_body(
        self, headers: dict[bytes, str], receive: Receive, context: RequestContext
    ) -> None:
        kind = headers.get(b"content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            message = "send the header 'Content-Type: application/json'"
            raise RequestError(415, message, "content_type")
        encoding = headers.get(b"content-encoding", "").strip().lower()
        if encoding not in ("", "identity", "gzip", "x-gzip"):
            message = "bodies may be sent as they are or with 'Content-Encoding: gzip'"
            raise RequestError(415, f"{message}, in no other encoding", "content_encoding")
        declared = headers.get(b"content-length", "")
        self._hold(0, int(declared) if declared.isdecimal() else 0, context)
        seconds = self._limits.body_seconds
        try:
            async with asyncio.timeout(seconds):
                more = True
                while more:
                    received = await receive()
                    if received["type"] == "http.disconnect":
                        raise ClientGoneError
                    more = received.get("more_body", False)
                    self._add(received.get("body", b""), context)
                if encoding not in ("", "identity"):
                    await self._unpack(context)
        except TimeoutError as error:
            message = f"the body did not arrive within {seconds:g} seconds"
            raise RequestError(408, message, "slow_body") from error

    async def _unpack(self, context: RequestContext) -> None:
        """Unpack gzip, which counts as what it holds from then on."""
        packed, context.body = context.body, bytearray()
        for piece in _gzip_pieces(packed):
            self._add(piece, context)
            await asyncio.sleep(0)  # a few bytes may hold many: others take turns
        self._hold(-len(packed), 0, context)

    def _add(self, part: bytes, context: RequestContext) -> None:
        self._hold(len(part), len(context.body) + len(part), context)
        context.body += part

    def _hold(self, more: int, size: int, context: RequestContext) -> None:
        """Count bytes of a body that are held from now on; ``size`` is what it has so far."""
        limit = self._limits.max_body_bytes
        if size > limit:
            message = f"the body is larger than {limit} bytes; send several requests"
            raise RequestError(413, message, "body_too_large")
        if self._inflight_bytes + more > self._limits.max_inflight_bytes:
            raise _too_busy()
        self._inflight_bytes += more
        context.held_bytes += more

    def _watched(self, send: Send, context: RequestContext) -> Send:
        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                context.status = message["status"]
                named = (b"x-request-id", context.request_id.encode())
                message["headers"] = [*message.get("headers", ()), named]
            await send(message)

        return watched

    def _note(self, method: str, context: RequestContext) -> None:
        seconds = time.perf_counter() - context.start
        route = context.path if context.path in self._routes else "other"
        self._metrics.requests.labels(route, str(context.status)).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        if self._log and route not in OPEN_PATHS:
            log_event(
                "request",
                request=context.request_id,
                client=context.client,
                method=method,
                route=route,
                status=context.status,
                ms=round(1000 * seconds, 1),
                bytes=context.held_bytes,
                texts=context.texts,
                tokens=context.tokens,
            )


def _too_busy() -> RequestError:
    message = "too many requests are under way; send this one again after Retry-After seconds"
    return RequestError(429, message, "overloaded", retry_seconds=1)


def _gzip_pieces(packed: bytearray) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as file:
            while piece := file.read(PIECE_BYTES):
                yield piece
            if packed:
                return
    except (OSError, EOFError, zlib.error):
        pass
    message = "the body is damaged or no gzip, as Content-Encoding says"
    raise RequestError(400, message, "invalid_body") from None


class ApiKeys:
    """The keys of a server by the names that logs may show; only their digests are held."""

    def __init__(self, keys: dict[str, str]) -> None:
        self._digests = {name: hashlib.sha256(key.encode()).digest() for name, key in keys.items()}

    def owner(self, header: str | None) -> str | None:
        """Name the key of an ``Authorization`` header; all are compared, so time tells nothing."""
        scheme, _, given = (header or "").partition(" ")
        digest = hashlib.sha256(given.strip().encode("latin-1", "replace")).digest()
        found = None
        for name, known in self._digests.items():
            if hmac.compare_digest(digest, known):
                found = name
        return found if scheme.lower() == "bearer" else None


def read_keys(path: Path) -> ApiKeys:
    """Read a file of keys: one per line, ``name:key`` or the key alone; ``#`` begins a comment."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("cannot be read", where=str(path), expected="a file of keys") from error
    keys: dict[str, str] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        name, colon, key = line.partition(":")
        if not colon:
            name, key = f"key-{number}", name
        if len(key) < MIN_KEY_CHARS or not key.isascii() or name in keys:
            raise ConfigError(
                "not a key, too short, or its name stands twice",
                where=f"{path}:{number}",
                expected=f"name:key, the key of at least {MIN_KEY_CHARS} ASCII characters",
                hint="Make one with: openssl rand -hex 24",
            )
        keys[name] = key
    if not keys:
        raise ConfigError("no keys in it", where=str(path), expected="one key per line")
    return ApiKeys(keys)
