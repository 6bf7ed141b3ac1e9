"""A chat endpoint that may be slow, full or broken for a while.

In: a prompt; out: the text that the model wrote. Requests are spaced to a rate; timeouts, lost
connections, 429 and 5xx are waited out with growing pauses, or as long as the endpoint says. The
key of the endpoint is sent to it and shown nowhere else. Next file: ``journal.py``.
"""

from __future__ import annotations

import asyncio
import email.utils
import os
import random
import time
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from nvembed.building.synthesis.config import SynthesisConfig
from nvembed.core.errors import ConfigError, UserError

if TYPE_CHECKING:
    import httpx2

_LONGEST_PAUSE = 60.0  # seconds, of our own choice
_LONGEST_WAIT = 600.0  # seconds that an endpoint may ask to wait
_RETRIED = frozenset({408, 425, 429})
_SHOWN = 200  # characters of a response in an error
_SHORTEST_SECRET = 8  # shorter keys are placeholders such as "EMPTY"


class EndpointError(UserError):
    """The endpoint refuses our requests, or is not there."""


class UnansweredError(Exception):
    """One request came to nothing, however often it was sent."""


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """What came back.

    Args:
        text: of the first choice; empty where there is none.
        problem: what is wrong with the response as such; None where nothing is.
        prompt_tokens: as the endpoint counts them; None where it does not.
        answer_tokens: the same of the answer.
    """

    text: str
    problem: str | None
    prompt_tokens: int | None
    answer_tokens: int | None


def read_key(variable: str) -> str | None:
    """Read the key of the endpoint from the environment.

    Raises:
        ConfigError: it holds what no key holds; the key is not shown.
    """
    key = os.environ.get(variable, "").strip()
    if not key:
        return None
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigError(
            "holds blanks, line breaks or characters beyond ASCII",
            where=f"environment variable {variable}",
            expected="the key of the endpoint",
        )
    return key


class ChatEndpoint:
    """Sends prompts; used with ``async with``.

    Args:
        config: where, how fast, how often.
        key: of the endpoint; None for none.

    Raises:
        ModuleNotFoundError: httpx2 is not installed (extra ``synth``).
    """

    def __init__(self, config: SynthesisConfig, key: str | None) -> None:
        import httpx2

        self._httpx = httpx2
        self._config = config
        self._key = key
        self._url = f"{config.endpoint}/chat/completions"
        self._pace = _Pace(config.requests_per_minute)
        self._client = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else None,
            timeout=config.timeout,
            # Reading the certificates of the system takes half a second.
            verify=config.endpoint.startswith("https"),
            limits=httpx2.Limits(max_connections=config.concurrency),
        )

    async def __aenter__(self) -> ChatEndpoint:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._client.aclose()

    async def ask(self, prompt: str) -> ChatAnswer:
        """Send a prompt until it is answered.

        Raises:
            UnansweredError: it was not, in all the times that the configuration allows.
            EndpointError: the endpoint refuses it for good (no such model, no right to ask).
        """
        body = {
            "model": self._config.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": self._config.temperature,
            "max_tokens": self._config.max_answer_tokens,
        }
        problem = ""
        for sent in range(self._config.retries + 1):
            await self._pace.wait()
            wait: float | None = None
            try:
                async with asyncio.timeout(self._config.timeout):
                    response = await self._client.post(self._url, json=body)
            except (TimeoutError, self._httpx.TimeoutException):
                problem = f"no answer within {self._config.timeout:g} s"
            except self._httpx.TransportError as error:
                problem = self._clean(f"{type(error).__name__}: {error}")
            else:
                if response.status_code == 200:
                    return self._read(response)
                problem = self._describe(response)
                if response.status_code not in _RETRIED and response.status_code < 500:
                    raise EndpointError(
                        f"the endpoint refuses the request: {problem}",
                        where=self._url,
                        hint="Check the address, the model and the key "
                        f"(environment variable {self._config.key_variable})",
                    )
                wait = retry_after(response.headers.get("Retry-After"), time.time())
                if wait is not None and wait > _LONGEST_WAIT:
                    problem += f", asks to wait {wait:,.0f} s"
                    break
            if sent == self._config.retries:
                break
            pause = min(_LONGEST_PAUSE, self._config.retry_delay * 2**sent)
            pause *= random.uniform(0.5, 1.0)
            if wait is not None:
                # It is full for all of us. The jitter keeps us from coming back at once.
                self._pace.hold(wait)
                pause = wait + random.uniform(0, 0.1 * wait)
            await asyncio.sleep(pause)
        raise UnansweredError(problem)

    def _read(self, response: httpx2.Response) -> ChatAnswer:
        try:
            body: Any = response.json()
        except (ValueError, RecursionError):
            return ChatAnswer("", "the response is no JSON", None, None)
        usage = body.get("usage") if isinstance(body, dict) else None
        tokens = [
            count if isinstance(count, int) and not isinstance(count, bool) else None
            for name in ("prompt_tokens", "completion_tokens")
            for count in [usage.get(name) if isinstance(usage, dict) else None]
        ]
        try:
            choice = body["choices"][0]
            text = choice["message"]["content"]
        except (KeyError, IndexError, TypeError):
            return ChatAnswer("", "the response holds no answer", *tokens)
        if not isinstance(text, str) or not text.strip():
            return ChatAnswer("", "the answer is empty", *tokens)
        cut = choice.get("finish_reason") == "length"
        return ChatAnswer(self._clean(text), "the answer was cut" if cut else None, *tokens)

    def _describe(self, response: httpx2.Response) -> str:
        text = " ".join(self._clean(response.text).split())
        return f"status {response.status_code}" + (f" ({text[:_SHOWN]})" if text else "")

    def _clean(self, text: str) -> str:
        """Take the key out: some endpoints repeat it in their messages."""
        if self._key and len(self._key) >= _SHORTEST_SECRET:
            return text.replace(self._key, "[key]")
        return text


def retry_after(value: str | None, now: float) -> float | None:
    """Return the seconds to wait that a Retry-After header asks for.

    Args:
        value: seconds or a date; None for no header.
        now: seconds since 1970.

    Returns:
        At least 0; None where there is no header or it says nothing.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - now
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if seconds < float("inf") else None


class _Pace:
    """Starts of requests, evenly spaced to a rate."""

    def __init__(self, per_minute: float | None) -> None:
        self._interval = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._held_until = 0.0

    async def wait(self) -> None:
        """Wait for the next start."""
        while True:
            now = time.monotonic()
            start = max(now, self._next, self._held_until)
            self._next = start + self._interval
            await asyncio.sleep(start - now)
            if self._held_until <= time.monotonic():
                return

    def hold(self, seconds: float) -> None:
        """Let nobody start before that."""
        self._held_until = max(self._held_until, time.monotonic() + seconds)
