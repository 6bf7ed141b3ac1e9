"""What a client is told when a request cannot be answered: a status and what to change."""

from __future__ import annotations

import math
from typing import Any

from starlette.responses import JSONResponse

# OpenAI's kind of error by status, and TEI's.
_OPENAI_TYPES = {401: "authentication_error", 429: "rate_limit_error", 503: "server_error"}
_TEI_TYPES = {401: "Unauthorized", 429: "Overloaded", 503: "Unhealthy"}

TEI_PATHS = ("/", "/embed", "/rerank", "/similarity", "/tokenize", "/info")


class ClientGoneError(Exception):
    """The client closed the connection before its answer was ready."""


class RequestError(Exception):
    """A request that is refused with 4xx, or given up with 503 where its client did nothing wrong.

    Args:
        status: of HTTP.
        message: what was wrong and what to change; never holds a text of the client.
        code: one word for machines.
        param: the field of the body.
        retry_seconds: when to try again (429 and 503).
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str = "bad_input",
        param: str | None = None,
        retry_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_seconds = retry_seconds

    def headers(self) -> dict[str, str]:
        """Return ``Retry-After`` in whole seconds, what 401 asks for, and the end of keep-alive."""
        headers = {}
        if self.retry_seconds is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_seconds)))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.code in ("slow_body", "body_too_large"):
            headers["connection"] = "close"  # the rest of the body is not read
        return headers

    def response(self, path: str) -> JSONResponse:
        """Render the answer in the form of the API that the path belongs to."""
        content: dict[str, Any]
        if path in TEI_PATHS:
            kind = _TEI_TYPES.get(self.status, "Validation")
            content = {"error": self.message, "error_type": kind}
        else:
            kind = _OPENAI_TYPES.get(self.status, "invalid_request_error")
            inner = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
            content = {"error": inner}
        return JSONResponse(content, status_code=self.status, headers=self.headers())
