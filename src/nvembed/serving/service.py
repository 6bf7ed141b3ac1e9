"""From checked texts to vectors, off the event loop; what both APIs call.

Limits of a request are checked here, before a text costs anything.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Hashable, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request

from nvembed.core.errors import UserError
from nvembed.serving.batcher import Batcher
from nvembed.serving.batching import Scheduler
from nvembed.serving.config import ServerConfig
from nvembed.serving.engine import Engine, Item, Token, Wish
from nvembed.serving.errors import RequestError
from nvembed.serving.metrics import Metrics

T = TypeVar("T")
SizedT = TypeVar("SizedT", bound=Sized)

# Characters (or ids) of one visit to the tokeniser's thread: requests take turns there.
_SLICE_CHARS = 50_000
# So few are tokenised (a few tenths of a millisecond) faster than they are handed to a thread.
_SMALL_CHARS = 2_000


class ClientGoneError(Exception):
    """The client closed the connection before its answer was ready."""


class Service:
    """A model with its queue.

    Args:
        engine: the model.
        config: all settings.
        metrics: where everything is counted.
    """

    def __init__(self, engine: Engine, config: ServerConfig, metrics: Metrics) -> None:
        self.engine = engine
        self.config = config
        self.model_name = config.model_name or "nvembed"
        self.model_names = (self.model_name, *config.model_aliases)
        self.metrics = metrics
        batching = config.batching
        scheduler = Scheduler(
            batch_tokens=batching.batch_tokens or engine.batch_tokens,
            max_wait=batching.max_wait_ms / 1000,
            queue_tokens=batching.queue_tokens,
        )
        self.batcher = Batcher(engine, scheduler, metrics)
        self._tokeniser = ThreadPoolExecutor(1, thread_name_prefix="nvembed-tokeniser")
        self._tokenising = threading.Lock()

    def start(self) -> None:
        """Start the threads."""
        self.batcher.start()

    def close(self) -> None:
        """Finish what was accepted and stop the threads."""
        self.batcher.close()
        self._tokeniser.shutdown()

    async def prepare(self, texts: Sequence[str], wish: Wish, *, param: str) -> list[Item]:
        """Check and tokenise texts.

        Raises:
            RequestError: too many, too long or empty texts, or an instruction without room (4xx).
        """
        self._check_texts(texts, param)
        items = await self._in_turns(
            texts, lambda part: self.engine.prepare(part, wish), param=param
        )
        self._check_lengths(items, param)
        return items

    async def tokens(
        self, texts: Sequence[str], prompt: str, *, special: bool
    ) -> list[list[Token]]:
        """Return the tokens of texts; see ``Engine.tokens``.

        Raises:
            RequestError: too many or too long texts, or more tokens than may wait (4xx).
        """
        self._check_texts(texts, "inputs")
        limit = self.config.batching.queue_tokens
        found = 0

        def part_tokens(part: Sequence[str]) -> list[list[Token]]:
            nonlocal found
            if found > limit:
                return []
            rows = self.engine.tokens(part, prompt, special=special)
            found += sum(map(len, rows))
            return rows

        rows = await self._in_turns(texts, part_tokens, param="inputs")
        if found > limit:
            raise RequestError(
                413,
                f"the texts have more than {limit} tokens; send several requests",
                code="too_many_tokens",
                param="inputs",
            )
        return rows

    async def prepare_ids(
        self, rows: Sequence[Sequence[int]], wish: Wish, *, param: str
    ) -> list[Item]:
        """Check token ids.

        Raises:
            RequestError: as above, and where this model takes texts only.
        """
        if not self.engine.takes_ids:
            raise RequestError(
                400, "this model takes texts, no token ids; send texts", code="no_ids", param=param
            )
        self._check_count(len(rows), param)
        items = await self._in_turns(
            rows, lambda part: self.engine.prepare_ids(part, wish), param=param
        )
        self._check_lengths(items, param)
        return items

    async def embed(self, items: Sequence[Item], client: Hashable) -> NDArray[np.float32]:
        """Return ``(len(items), dimension)``, at length 1 where wanted; see ``Batcher.embed``."""
        return await self.batcher.embed(items, client)

    async def finish(self, request: Request, work: Coroutine[Any, Any, T]) -> T:
        """Run the work of a request for as long as its client is there and time is left.

        Raises:
            RequestError: out of time (503).
            ClientGoneError: the client closed the connection; the work was cancelled.
        """
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_wait_until_gone(request))
        try:
            seconds = self.config.limits.request_seconds
            await asyncio.wait((task, gone), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if gone.done():
                self.metrics.cancelled.inc()
                raise ClientGoneError
            raise RequestError(
                503,
                f"not ready after {seconds:g} seconds; send fewer texts, or again later",
                code="timeout",
                retry_seconds=5,
            )
        finally:
            for other in (task, gone):
                if not other.done():
                    other.cancel()

    def _check_texts(self, texts: Sequence[str], param: str) -> None:
        self._check_count(len(texts), param)
        limit = self.config.limits.max_text_chars
        for row, text in enumerate(texts):
            if not text.strip():
                raise RequestError(
                    400, f"text {row} is empty; leave it out", code="empty_text", param=param
                )
            if len(text) > limit:
                raise RequestError(
                    413,
                    f"text {row} has {len(text)} characters, this server takes {limit}; split it",
                    code="text_too_long",
                    param=param,
                )

    def _check_lengths(self, items: Sequence[Item], param: str) -> None:
        """Refuse texts that were not to be cut and are too long for the model."""
        limit = self.engine.max_tokens
        for row, item in enumerate(items):
            if item.tokens > limit:
                raise RequestError(
                    413,
                    f"text {row} has {item.tokens} tokens, the model takes {limit}; "
                    "split it or let it be cut",
                    code="text_too_long",
                    param=param,
                )

    def _check_count(self, count: int, param: str) -> None:
        limit = self.config.limits.max_texts
        if count == 0:
            raise RequestError(
                400, "an empty list; send at least one text", code="no_texts", param=param
            )
        if count > limit:
            raise RequestError(
                413,
                f"{count} texts, this server takes {limit} per request; send several requests",
                code="too_many_texts",
                param=param,
            )

    async def _in_turns(
        self,
        rows: Sequence[SizedT],
        prepare: Callable[[Sequence[SizedT]], list[T]],
        *,
        param: str,
    ) -> list[T]:
        """Call the tokenizer for slices of the rows, off the event loop where there are many."""

        def in_turn(part: Sequence[SizedT]) -> list[T]:
            with self._tokenising:
                return prepare(part)

        loop = asyncio.get_running_loop()
        items: list[T] = []
        try:
            if sum(map(len, rows)) <= _SMALL_CHARS and self._tokenising.acquire(blocking=False):
                try:
                    return prepare(rows)
                finally:
                    self._tokenising.release()
            for part in _slices(rows):
                items += await loop.run_in_executor(self._tokeniser, in_turn, part)
        except UserError as error:
            raise RequestError(400, str(error), code="bad_input", param=param) from error
        return items


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _slices(rows: Sequence[Any]) -> list[Sequence[Any]]:
    slices, start, size = [], 0, 0
    for row, content in enumerate(rows):
        size += len(content)
        if size >= _SLICE_CHARS:
            slices.append(rows[start : row + 1])
            start, size = row + 1, 0
    if start < len(rows):
        slices.append(rows[start:])
    return slices
