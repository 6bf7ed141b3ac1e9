"""What a client is told when a request cannot be answered: a status and what to change."""

from __future__ import annotations

import math
from typing import Any

# OpenAI's kind of error by status, and TEI's.
_OPENAI_TYPES = {401: "authentication_error", 429: "rate_limit_error", 503: "server_error"}
_TEI_TYPES = {401: "Unauthorized", 429: "Overloaded", 503: "Unhealthy"}

TEI_PATHS = ("/", "/embed", "/rerank", "/similarity", "/tokenize", "/info")


class RequestError(Exception):
    """A request that is refused or given up.

    Args:
        status: of HTTP; 4xx, or 503 where the client did nothing wrong.
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
        code: str,
        param: str | None = None,
        retry_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_seconds = retry_seconds

    def body(self, path: str) -> dict[str, Any]:
        """Return the answer in the form of the API that the path belongs to."""
        if path in TEI_PATHS:
            kind = _TEI_TYPES.get(self.status, "Validation")
            return {"error": self.message, "error_type": kind}
        kind = _OPENAI_TYPES.get(self.status, "invalid_request_error")
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def headers(self) -> dict[str, str]:
        """Return ``Retry-After`` in whole seconds, and what 401 asks for."""
        headers = {}
        if self.retry_seconds is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_seconds)))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers
