"""What a client is told when a request cannot be answered: a status and what to change."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from starlette.responses import JSONResponse

# OpenAI's kind of error by status, and TEI's.
_OPENAI_TYPES = {401: "authentication_error", 429: "rate_limit_error", 503: "server_error"}
_TEI_TYPES = {401: "Unauthorized", 429: "Overloaded", 503: "Unhealthy"}

Api = Literal["openai", "tei", "cohere", "ollama"]

_TEI_PATHS = ("/", "/embed", "/rerank", "/similarity", "/tokenize", "/info")


def api_of(path: str) -> Api:
    """Name the API that a path belongs to, which decides the form of its errors."""
    if path in _TEI_PATHS:
        return "tei"
    return (
        "cohere" if path.startswith("/v2/") else "ollama" if path.startswith("/api/") else "openai"
    )


class ClientGoneError(Exception):
    """The client closed the connection before its answer was ready."""


@dataclass(eq=False)
class RequestError(Exception):
    """A request that is refused (4xx), or given up where its client did nothing wrong (503)."""

    status: int
    message: str  # what was wrong and what to change; never holds a text of the client
    code: str = "bad_input"  # one word for machines
    param: str | None = None  # the field of the body
    retry_seconds: float | None = None  # when to try again (429 and 503)

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
        api = api_of(path)
        if api == "openai":
            kind = _OPENAI_TYPES.get(self.status, "invalid_request_error")
            inner = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
            content: dict[str, Any] = {"error": inner}
        elif api == "tei":
            kind = _TEI_TYPES.get(self.status, "Validation")
            content = {"error": self.message, "error_type": kind}
        else:
            content = {"message" if api == "cohere" else "error": self.message}
        return JSONResponse(content, status_code=self.status, headers=self.headers())
