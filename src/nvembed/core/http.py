"""Requests to endpoints that are busy, slow or broken at times: the one policy of trying again.

Servers get the address that they will listen on here as well.

Overloads (408, 425, 429), errors of the server (5xx), time running out and lost connections pass:
the request is sent again after growing pauses, or when the endpoint says. Other refusals are final.
"""

from __future__ import annotations

import email.utils
import json
import os
import socket
import time
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from nvembed.core.errors import ConfigError, ModelError

if TYPE_CHECKING:
    import ssl

    import httpx2

# Where the key may stand; it is read when it is sent and kept nowhere.
KEY_VARIABLES = ("NVEMBED_API_KEY", "OPENAI_API_KEY")
ATTEMPTS = 7
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 60.0  # of our own choice
LONGEST_ASKED_SECONDS = 600.0  # that an endpoint may ask for
_PASSING = frozenset({408, 425, 429})
_SHOWN = 200  # characters of what an endpoint says
_SHORTEST_SECRET = 8  # shorter keys are placeholders such as "EMPTY"


class Trouble(NamedTuple):
    """Why a request was not answered, and whether to try again."""

    problem: str
    said: str = ""  # the endpoint's own words, shortened and without the key
    asked: float | None = None  # seconds that it asks to wait
    refused: int | None = None  # status of a refusal that is final


def post_json(url: str, body: dict[str, Any], *, timeout: float = 120.0) -> dict[str, Any]:
    """Send an object and return the one that comes back; seven attempts, then a ModelError.

    A key of the environment goes along; it stands in no message.
    """
    import httpx2

    key = read_key(*KEY_VARIABLES)
    headers = json_headers(key)
    data = json.dumps(body).encode()
    for attempt in range(ATTEMPTS):
        try:
            response = httpx2.post(
                url, content=data, headers=headers, timeout=timeout, verify=certificates(url)
            )
            found = trouble_of(response, key)
            if found is None and isinstance(value := response.json(), dict):
                return value
            trouble = found or Trouble(f"a JSON {type(value).__name__} came back")
        except (ValueError, RecursionError):
            trouble = Trouble("not JSON")
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            trouble = Trouble(without_key(str(error) or type(error).__name__, key))
        if trouble.refused is not None:
            raise _refusal(url, trouble)
        if attempt == ATTEMPTS - 1 or (trouble.asked or 0.0) > LONGEST_ASKED_SECONDS:
            break
        time.sleep(pause(attempt, FIRST_WAIT_SECONDS, trouble.asked))
    raise ModelError(
        f"no usable answer in {attempt + 1} attempts; the last: {trouble.problem}",
        where=url,
        hint="What was done is kept: the same command goes on from there",
    )


def _refusal(url: str, trouble: Trouble) -> ModelError:
    key = f"Set the environment variable {KEY_VARIABLES[0]} to a key that is allowed this"
    address = "Check the address, which usually ends in /v1, and the name of the model"
    hint = {401: key, 403: key, 404: address}.get(trouble.refused or 0)
    message = f"refused with {trouble.problem} {trouble.said}".strip()
    return ModelError(message, where=url, hint=hint)


# --- The policy -----------------------------------------------------------------------------------


def trouble_of(response: httpx2.Response, key: str | None, mark: str = "…") -> Trouble | None:
    """Tell what is wrong with a response by its status; None where nothing is."""
    status = response.status_code
    if response.is_success:
        return None
    said = " ".join(without_key(response.text, key, mark).split())[:_SHOWN]
    asked = retry_after(response.headers.get("Retry-After"), time.time())
    problem = f"status {status}"
    if asked is not None and asked > LONGEST_ASKED_SECONDS:
        problem += f", asks to wait {asked:,.0f} s"
    final = status not in _PASSING and status < 500
    return Trouble(problem, said, asked, status if final else None)


def pause(attempt: int, first_wait: float, asked: float | None) -> float:
    """Return the seconds to wait after an attempt, of which 0 is the first."""
    return min(LONGEST_WAIT_SECONDS, first_wait * 2**attempt) if asked is None else asked


def retry_after(value: str | None, now: float) -> float | None:
    """Return the seconds from ``now`` (since 1970) that a Retry-After header, or its date, asks."""
    try:
        seconds = float(value or "")
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value or "").timestamp() - now
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if seconds < float("inf") else None


def read_key(*variables: str) -> str | None:
    """Read the key of an endpoint from the first of the environment variables that holds one."""
    for variable in variables:
        key = os.environ.get(variable, "").strip()
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ConfigError(
                "holds blanks, line breaks or characters beyond ASCII",
                where=f"environment variable {variable}",
                expected="the key of the endpoint",
            )
        if key:
            return key
    return None


def without_key(text: str, key: str | None, mark: str = "…") -> str:
    """Take a key out of a text: some endpoints repeat in their messages what they were sent."""
    return text.replace(key, mark) if key and len(key) >= _SHORTEST_SECRET else text


def json_headers(key: str | None) -> dict[str, str]:
    """Return the headers of a request whose body is JSON."""
    authorization = {"Authorization": f"Bearer {key}"} if key else {}
    return {"Content-Type": "application/json", **authorization}


def certificates(url: str) -> ssl.SSLContext | bool:
    """Return what an https connection is checked with, read once: it takes a tenth of a second."""
    return _certificates() if url.startswith("https") else False


@cache
def _certificates() -> ssl.SSLContext:
    import httpx2

    return httpx2.create_ssl_context()


def bound_socket(host: str, port: int) -> socket.socket:
    """Take an address for a server, which may listen there later; port 0 is any free one.

    Raises:
        ConfigError: the address is taken, or not of this machine.
    """
    taken = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((host, port))
    except OSError as error:
        taken.close()
        why = (error.strerror or str(error)).lower()
        raise ConfigError(
            f"cannot listen there ({why})", where=f"{host}:{port}", hint="Choose another --port"
        ) from error
    return taken


def address_of(place: socket.socket) -> str:
    """The address of a server as a client writes it."""
    host, port = place.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
