"""Limits on the headers of requests and on the number of connections, around uvicorn's protocol.

uvicorn waits for headers for ever. It closes connections that are idle between two requests itself
(``timeout_keep_alive``); bodies and answers have their limits in ``middleware.py``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from nvembed.serving.config import LimitsConfig


def limited_connections(limits: LimitsConfig) -> Callable[..., asyncio.Protocol]:
    """Return what uvicorn calls for every connection (its option ``http``)."""
    return partial(_LimitedConnection, limits)


class _LimitedConnection(asyncio.Protocol):
    """Hands everything to uvicorn's protocol, which has a new ``cycle`` once headers are whole."""

    def __init__(self, limits: LimitsConfig, *, server_state: ServerState, **given: Any) -> None:
        self._limits = limits
        self._connections = server_state.connections
        self._http = HttpToolsProtocol(server_state=server_state, **given)
        self._deadline: asyncio.TimerHandle | None = None
        self._header_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._http.connection_made(transport)  # type: ignore[arg-type]  # as uvicorn narrows it
        if len(self._connections) > self._limits.max_connections:
            transport.close()
        else:
            self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_headers()
        self._http.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self._http.cycle
        self._http.data_received(data)
        cycle = self._http.cycle
        if cycle is not before:
            self._end_headers()
        elif (cycle is None or cycle.response_complete) and not self._http.transport.is_closing():
            self._expect_headers()
            if cycle is None or not cycle.more_body:  # else of a body that was refused unread
                self._header_bytes += len(data)
            if self._header_bytes > self._limits.max_header_bytes:
                self._refuse("431 Request Header Fields Too Large")

    def eof_received(self) -> None:
        self._http.eof_received()

    def pause_writing(self) -> None:
        self._http.pause_writing()

    def resume_writing(self) -> None:
        self._http.resume_writing()

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
