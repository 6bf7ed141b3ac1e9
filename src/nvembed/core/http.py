"""JSON over HTTP with patience: for endpoints that are busy, slow or broken at times.

    post_json(url, {...}) -> the answer's object

Only the standard library: no command needs a client package for one kind of request.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from typing import Any

from nvembed.core.errors import ModelError

# Where the key may stand; it is read when it is sent and kept nowhere.
KEY_VARIABLES = ("NVEMBED_API_KEY", "OPENAI_API_KEY")
ATTEMPTS = 7
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 60.0
_SHOWN = 200


def post_json(url: str, body: dict[str, Any], *, timeout: float = 120.0) -> dict[str, Any]:
    """Send an object and return the one that comes back.

    Too many requests (429), errors of the server (5xx), time running out, lost connections and
    answers that are no JSON are tried again, after 1, 2, 4 … seconds or what ``Retry-After`` asks
    for, seven times in all. A key in ``$NVEMBED_API_KEY`` or ``$OPENAI_API_KEY`` goes along; it
    stands in no message.

    Raises:
        ModelError: another refusal, at once, or no answer in the end.
    """
    data = json.dumps(body).encode()
    for attempt in range(ATTEMPTS):
        wait = min(FIRST_WAIT_SECONDS * 2**attempt, LONGEST_WAIT_SECONDS)
        try:
            with urllib.request.urlopen(_request(url, data), timeout=timeout) as answer:
                value = json.loads(answer.read())
            if isinstance(value, dict):
                return value
            problem = f"a JSON {type(value).__name__} came back"
        except urllib.error.HTTPError as error:
            with error:
                if error.code != 429 and error.code < 500:
                    raise _refusal(url, error) from error
                problem = f"status {error.code}"
                wait = _asked_for(error) or wait
        except (OSError, http.client.HTTPException, ValueError) as error:
            problem = _reason(error)
        if attempt < ATTEMPTS - 1:
            time.sleep(wait)
    raise ModelError(
        f"no usable answer in {ATTEMPTS} attempts; the last: {problem}",
        where=url,
        hint="What was done is kept: the same command goes on from there",
    )


def _request(url: str, data: bytes) -> urllib.request.Request:
    headers = {"Content-Type": "application/json"}
    key = next(filter(None, map(os.environ.get, KEY_VARIABLES)), None)
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    return urllib.request.Request(url, data=data, headers=headers)


def _refusal(url: str, error: urllib.error.HTTPError) -> ModelError:
    try:
        said = error.read(4096).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        said = ""
    for variable in KEY_VARIABLES:  # some servers repeat the key that they refuse
        if key := os.environ.get(variable):
            said = said.replace(key, "…")
    said = " ".join(said.split())[:_SHOWN]
    hint = None
    if error.code in (401, 403):
        hint = f"Set the environment variable {KEY_VARIABLES[0]} to a key that is allowed this"
    elif error.code == 404:
        hint = "Check the address, which usually ends in /v1, and the name of the model"
    return ModelError(f"refused with status {error.code} {said}".strip(), where=url, hint=hint)


def _asked_for(error: urllib.error.HTTPError) -> float | None:
    try:
        seconds = float(error.headers.get("Retry-After", ""))
    except ValueError:  # not there, or a date
        return None
    return min(max(seconds, 0.0), LONGEST_WAIT_SECONDS)


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return "not JSON"
    reason = getattr(error, "reason", error)
    return str(reason) or type(error).__name__
