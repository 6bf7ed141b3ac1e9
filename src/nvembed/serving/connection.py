"""Connections that send nothing, or their headers byte by byte: uvicorn alone waits for ever.

Bodies and answers have their limits in ``limits.py``, connections that are idle between two
requests are closed by uvicorn. What is left is here: how long and how large the headers may be, and
how many connections may be open.
"""

from __future__ import annotations

import asyncio
from typing import ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from nvembed.serving.config import LimitsConfig

_SLOW = "408 Request Timeout"
_LARGE = "431 Request Header Fields Too Large"


class LimitedConnection(HttpToolsProtocol):
    """A connection whose headers are limited in time and size; see ``limited_connections``."""

    limits: ClassVar[LimitsConfig]

    _deadline: asyncio.TimerHandle | None = None
    _header_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, unless there are too many connections."""
        super().connection_made(transport)  # type: ignore[arg-type]  # as uvicorn narrows it
        if len(self.connections) > self.limits.max_connections:
            self.transport.close()
        else:
            self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._headers_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take a part of a request."""
        super().data_received(data)
        if self._deadline is not None and not self.transport.is_closing():
            self._header_bytes += len(data)
            if self._header_bytes > self.limits.max_header_bytes:
                self._refuse(_LARGE)

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._expect_headers()

    def on_headers_complete(self) -> None:
        """The empty line after the headers."""
        self._headers_came()
        super().on_headers_complete()

    def _expect_headers(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.limits.header_seconds, self._too_late)

    def _headers_came(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline, self._header_bytes = None, 0

    def _too_late(self) -> None:
        self._deadline = None
        if self.cycle is not None and not self.cycle.response_complete:
            self._expect_headers()  # of the next request; nothing is read before this one's answer
        else:
            self._refuse(_SLOW)

    def _refuse(self, status: str) -> None:
        head = f"HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
        self.transport.write(head.encode())
        self.transport.close()


def limited_connections(limits: LimitsConfig) -> type[LimitedConnection]:
    """Return the protocol class for these limits, which uvicorn makes one of per connection."""
    return type("LimitedConnection", (LimitedConnection,), {"limits": limits})
