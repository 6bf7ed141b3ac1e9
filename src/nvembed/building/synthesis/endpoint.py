"""Many requests to a chat endpoint at once, each until it has a valid answer or a reason why not.

Requests are spaced to a rate. What passes is waited out (``core/http.py``), by all of them where
the endpoint says for how long. The key is sent and shown nowhere else. Every answer goes into the
journal at once; what is in there already is not asked again.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel

from nvembed.building.synthesis.prompts import (
    AnswerError,
    SynthesisConfig,
    TaskList,
    WrittenExample,
    parse_answer,
)
from nvembed.core import http
from nvembed.core.errors import ConfigError, DataError, UserError
from nvembed.core.reporting import ProgressBar

if TYPE_CHECKING:
    import httpx2

# How the first line begins, which says what the run asks for: the mark of a journal.
_BEGINNING = b'{"run": {'


class JournalRow(BaseModel):
    """What became of a request: a valid answer, or the last text and why it was rejected.

    Tokens are counted over all attempts; ``uncounted`` are the answers without counts.
    """

    id: str
    answer: dict[str, Any] | None = None
    rejected: str | None = None
    text: str | None = None
    attempts: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    uncounted: int = 0


class Journal:
    """Rows by their names; holds their places in memory, not the rows. To be closed.

    ``run`` is what the run asks for. A journal of another run is not gone on with.
    """

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        self._path = path
        self._places: dict[str, int] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: a write that fails leaves nothing behind that closing would write again.
            self._out = open(path, "ab", buffering=0)
            self._in = open(path, "rb")
        except OSError as error:
            raise UserError(
                f"cannot open: {error.strerror or error}",
                where=str(path),
                hint="Choose a folder that can be written",
            ) from error
        try:
            self._read(run)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._in.close()
        self._out.close()

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def add(self, row: JournalRow) -> None:
        """Append a row under a name that is not there yet."""
        assert row.id not in self._places
        self._places[row.id] = self._append(row.model_dump(exclude_none=True))

    def __getitem__(self, name: str) -> JournalRow:
        self._in.seek(self._places[name])
        return JournalRow.model_validate_json(self._in.readline())

    def rows(self) -> Iterator[JournalRow]:
        """Yield all rows by their names, sorted."""
        for name in sorted(self._places):
            yield self[name]

    def _append(self, row: dict[str, Any]) -> int:
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        place = self._out.seek(0, 2)
        try:
            written = self._out.write(line)
            if written == len(line):
                return place
            problem = "no space left"
        except OSError as error:
            problem = error.strerror or str(error)
        self._out.truncate(place)  # half a line in the midst would spoil those after it
        raise UserError(
            f"cannot write: {problem}",
            where=str(self._path),
            hint="What was written is kept; free space and run the command again",
        )

    def _read(self, run: dict[str, Any]) -> None:
        place = 0
        for number, line in enumerate(self._in, start=1):
            torn = not line.endswith(b"\n")
            if torn and (number > 1 or line.startswith(_BEGINNING[: len(line)])):
                break  # half written when the process died
            try:
                if torn:
                    raise ValueError
                if number == 1:
                    before = json.loads(line)["run"]
                else:
                    self._places[JournalRow.model_validate_json(line).id] = place
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    "is no line of a journal",
                    where=f"{self._path}:{number}",
                    hint="Delete the line, or choose another folder",
                ) from error
            if number == 1 and before != run:
                known = before if isinstance(before, dict) else run
                changed = ", ".join(key for key in run if known.get(key) != run[key])
                raise ConfigError(
                    "the folder holds a synthesis with other settings"
                    + (f" ({changed})" if changed else ""),
                    where=str(self._path),
                    hint="Choose another folder, or the settings of before",
                )
            place += len(line)
        self._out.truncate(place)
        if place == 0:
            self._append({"run": run})


_KEY = "[key]"
# That many requests in a row without any answer: the endpoint is gone, not busy.
_GONE_AFTER = 10
_LONGEST_REJECT = 4000  # characters of a refused answer that are kept


class EndpointError(UserError):
    """The endpoint refuses our requests, or is not there."""


class Request(NamedTuple):
    """One question to the model; the same one has the same name whenever it is asked."""

    name: str
    prompt: str
    answer: type[TaskList] | type[WrittenExample]


class Asker:
    """Asks with the endpoint's key, if there is one, and writes into the journal; to be closed."""

    def __init__(self, config: SynthesisConfig, key: str | None, journal: Journal) -> None:
        import httpx2

        self._httpx = httpx2
        self._config = config
        self._key = key
        self._journal = journal
        self._url = f"{config.endpoint}/chat/completions"
        self._interval = 60.0 / (config.requests_per_minute or float("inf"))
        self._next = self._held_until = 0.0
        self._client = httpx2.AsyncClient(
            headers=http.json_headers(key),
            timeout=config.timeout,
            verify=http.certificates(config.endpoint),
            limits=httpx2.Limits(max_connections=config.concurrency),
        )
        self.aclose = self._client.aclose

    def begin(self, bar: ProgressBar) -> None:
        """Count anew; the bar advances by one per request."""
        self._bar = bar
        self._problem = ""
        self.unanswered = self._answered = self._in_a_row = 0

    async def ask_all(self, requests: Iterable[Request]) -> None:
        """Ask all requests that are not in the journal."""
        waiting = iter(requests)

        async def work() -> None:
            for request in waiting:
                if request.name not in self._journal:
                    await self._ask(request)
                self._bar.advance()

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._config.concurrency):
                    group.create_task(work())
        except ExceptionGroup as errors:
            # All workers meet the same error; one of them tells it.
            raise errors.exceptions[0] from None
        if self.unanswered and not self._answered:
            raise self._gone()

    async def _ask(self, request: Request) -> None:
        """Ask until the answer is as asked, or not at all where no answer comes."""
        row = JournalRow(id=request.name)
        while row.answer is None and row.attempts < self._config.attempts:
            row.attempts += 1
            response = await self._post(request.prompt)
            if response is None:
                self.unanswered += 1
                self._in_a_row += 1
                if self._in_a_row >= _GONE_AFTER:
                    raise self._gone()
                return
            self._in_a_row = 0
            self._answered += 1
            text, problem = self._read(response, row)
            row.text = text[:_LONGEST_REJECT]
            try:
                row.answer = parse_answer(text, request.answer).model_dump()
            except AnswerError as error:
                row.rejected = problem or str(error)
        if row.answer is not None:
            row.text = row.rejected = None
        self._journal.add(row)

    def _gone(self) -> EndpointError:
        return EndpointError(
            f"{self._in_a_row} requests in a row came to nothing; the last: {self._problem}",
            where=self._config.endpoint,
            hint="What was answered is kept: run the same command again to go on",
        )

    async def _post(self, prompt: str) -> httpx2.Response | None:
        """Send a prompt until it is answered; None where it never is."""
        config = self._config
        body = {
            "model": config.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": config.temperature,
            "max_tokens": config.max_answer_tokens,
        }
        for sent in range(config.retries + 1):
            await self._wait_for_turn()
            trouble: http.Trouble | None
            try:
                async with asyncio.timeout(config.timeout):
                    response = await self._client.post(self._url, content=json.dumps(body))
            except (TimeoutError, self._httpx.TimeoutException):
                trouble = http.Trouble(f"no answer within {config.timeout:g} s")
            except self._httpx.HTTPError as error:
                trouble = http.Trouble(
                    http.without_key(f"{type(error).__name__}: {error}", self._key, _KEY)
                )
            else:
                trouble = http.trouble_of(response, self._key, _KEY)
                if trouble is None:
                    return response
            self._problem = trouble.problem + (f" ({trouble.said})" if trouble.said else "")
            if trouble.refused is not None:
                raise EndpointError(
                    f"the endpoint refuses the request: {self._problem}",
                    where=self._url,
                    hint="Check the address, the model and the key "
                    f"(environment variable {config.key_variable})",
                )
            if sent == config.retries or (trouble.asked or 0.0) > http.LONGEST_ASKED_SECONDS:
                break
            wait = http.pause(sent, config.retry_delay, trouble.asked)
            if trouble.asked is None:
                wait *= random.uniform(0.5, 1.0)
            else:
                # It is full for all of us. The jitter keeps us from coming back at once.
                self._held_until = max(self._held_until, time.monotonic() + wait)
                wait *= random.uniform(1.0, 1.1)
            await asyncio.sleep(wait)
        return None

    async def _wait_for_turn(self) -> None:
        """Wait for the next start of a request; starts are evenly spaced."""
        while True:
            now = time.monotonic()
            start = max(now, self._next, self._held_until)
            self._next = start + self._interval
            await asyncio.sleep(start - now)
            if self._held_until <= time.monotonic():
                return

    def _read(self, response: httpx2.Response, row: JournalRow) -> tuple[str, str | None]:
        """Count the tokens of a response; return its text and what is wrong with it."""
        body: Any = None
        problem = "the response holds no answer"
        try:
            body = response.json()
        except (ValueError, RecursionError):
            problem = "the response is no JSON"
        usage = body.get("usage") if isinstance(body, dict) else None
        counts = usage if isinstance(usage, dict) else {}
        asked, answered = counts.get("prompt_tokens"), counts.get("completion_tokens")
        row.prompt_tokens += asked if type(asked) is int else 0
        row.answer_tokens += answered if type(answered) is int else 0
        row.uncounted += not (type(asked) is type(answered) is int)
        try:
            choice = body["choices"][0]
            text = choice["message"]["content"]
        except (KeyError, IndexError, TypeError):
            return "", problem
        if not isinstance(text, str) or not text.strip():
            return "", "the answer is empty"
        cut = choice.get("finish_reason") == "length"
        return http.without_key(text, self._key, _KEY), "the answer was cut" if cut else None
