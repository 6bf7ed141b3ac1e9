"""From the checked fields of a body to vectors, off the event loop; what all routes call.

Limits of a request are checked here, before a text costs anything.
"""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable, Coroutine, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request

from nvembed.core.errors import UserError
from nvembed.data.instructions import Side, find_instruction, read_task, resolve_prompt, side_prompt
from nvembed.model.encoder import unit_rows
from nvembed.serving.batching import Batcher, Scheduler
from nvembed.serving.config import ServerConfig
from nvembed.serving.engines import Cut, EmbedOptions, EncoderEngine, Item, Token
from nvembed.serving.errors import ClientGoneError, RequestError
from nvembed.serving.middleware import RequestContext
from nvembed.serving.telemetry import Metrics

T = TypeVar("T")
SizedT = TypeVar("SizedT", bound=Sized)

Inputs = str | list[str] | list[int] | list[list[int]]
"""A text, a list of texts, the ids of a text, or a list of such lists."""

CoherePurpose = Literal["search_query", "search_document", "classification", "clustering"]
JinaPurpose = Literal[
    "retrieval.query", "retrieval.passage", "text-matching", "classification", "separation"
]
Purpose = CoherePurpose | JinaPurpose
_SIDES: dict[str, Side] = {
    "search_query": "query",
    "retrieval.query": "query",
    "search_document": "document",
    "retrieval.passage": "document",
}

QUERY = ":query"
"""Behind the name of a model: the texts of a request that does not say otherwise are queries."""

# Characters (or ids) of one visit to the tokeniser's thread: requests take turns there.
_SLICE_CHARS = 50_000
# So few are tokenised (a few tenths of a millisecond) faster than they are handed to a thread.
_SMALL_CHARS = 2_000


class Service:
    """A model with its queue."""

    def __init__(
        self, engine: EncoderEngine, name: str, config: ServerConfig, metrics: Metrics
    ) -> None:
        self.engine = engine
        self.config = config
        self.model_name = name
        self.batch_tokens = config.batching.batch_tokens or engine.batch_tokens
        scheduler = Scheduler(
            batch_tokens=self.batch_tokens,
            max_wait=config.batching.max_wait_ms / 1000,
            queue_tokens=config.batching.queue_tokens,
        )
        self.batcher = Batcher(engine, scheduler, metrics)
        self._tokeniser = ThreadPoolExecutor(1, thread_name_prefix="nvembed-tokeniser")
        self._tokenising = threading.Lock()
        self._for_queries = False

    def close(self) -> None:
        """Finish what was accepted and stop the threads."""
        self.batcher.close()
        self._tokeniser.shutdown()

    def of_queries(self) -> Service:
        """Return the same model for clients that can say so by its name only."""
        view = copy.copy(self)
        view._for_queries = True
        return view

    def read_options(
        self,
        *,
        instruction: str | None = None,
        prompt_name: str | None = None,
        input_type: Side | None = None,
        cut: Cut = "end",
        normalize: bool = True,
    ) -> EmbedOptions:
        """Read how texts are to be embedded; with an instruction they are queries by default."""
        if instruction is not None and prompt_name is not None:
            message = "send an instruction or prompt_name, not both"
            raise RequestError(400, message, param="prompt_name")
        if not normalize and not self.engine.supports_raw:
            message = "this model gives vectors of length 1 only; leave normalize out"
            raise RequestError(400, message, param="normalize")
        if cut != "end" and not self.engine.supports_tokens:
            message = "this model always cuts the end of long texts; leave this out"
            raise RequestError(400, message, param="truncate")
        prompt = None if prompt_name is None else self.named_prompt(prompt_name)
        try:
            task = read_task(instruction, self.engine.prompts)
        except UserError as error:
            message = f"the instruction is neither a sentence nor a known task, {error.expected}"
            raise RequestError(400, message, "bad_instruction", "instruction") from None
        if self._for_queries and input_type == "document":
            message = f"{self.model_name}{QUERY} is for queries; ask for {self.model_name}"
            raise RequestError(400, message, "not_of_queries", "model")
        if self._for_queries:
            input_type = "query"
            if (task, prompt) == (None, None) and not side_prompt(self.engine.prompts, "query"):
                message = "this model has no instruction for queries; send one"
                message = f"{message}, or ask who runs the server to set task"
                raise RequestError(400, message, "no_instruction", "instruction")
        input_type = input_type or ("document" if task is None else "query")
        return EmbedOptions(input_type, task, prompt, cut, normalize)

    def options_for(self, purpose: Purpose, instruction: str | None, cut: Cut) -> EmbedOptions:
        """Read what Cohere and Jina call the purpose of texts.

        Searches have sides; of others texts are documents, with the model's own prompt of that name
        where it has one. An instruction wins over such a prompt.
        """
        if purpose in _SIDES:
            return self.read_options(instruction=instruction, input_type=_SIDES[purpose], cut=cut)
        wanted = (purpose, "clustering") if purpose == "separation" else (purpose,)
        prompt = next((name for name in self.engine.prompts if name.lower() in wanted), None)
        named = None if instruction is not None else prompt
        side: Side | None = "document" if instruction is None else None
        return self.read_options(
            instruction=instruction, prompt_name=named, input_type=side, cut=cut
        )

    def named_prompt(self, name: str) -> str:
        """Return a prompt of the model, or that of an MTEB task; a RequestError if it is none."""
        prompts = self.engine.prompts
        if name in prompts:
            return prompts[name] or ""
        if find_instruction(name) is None:
            known = ", ".join(sorted(prompts)[:10]) or "none"
            message = "the model has no prompt of that name; known are"
            message = f"{message} {known}, and the tasks of MTEB"
            raise RequestError(400, message, "unknown_prompt", "prompt_name")
        return resolve_prompt(name) or ""

    async def embed(
        self, parts: Sequence[tuple[Inputs, EmbedOptions]], context: RequestContext
    ) -> NDArray[np.float32]:
        """Embed the parts of one request: a row for every text, of length 1 where wanted."""
        items = [item for part in parts for item in await self._items(*part)]
        vectors = await self.batcher.embed(items, context.client)
        context.texts, context.tokens = len(items), sum(item.tokens for item in items)
        return vectors

    async def vectors(
        self,
        content: Inputs,
        options: EmbedOptions,
        dimensions: int | None,
        context: RequestContext,
    ) -> NDArray[np.float32]:
        """Embed the texts of a request: their first ``dimensions``, of length 1 where wanted."""
        width = self.engine.dimension
        if dimensions is not None and dimensions > width:
            message = f"{dimensions} dimensions asked for, the model has {width}"
            message = f"{message}; send at most that"
            raise RequestError(400, message, "bad_dimensions", param="dimensions")
        vectors = await self.embed([(content, options)], context)
        if dimensions is None:
            return vectors
        short = vectors[:, :dimensions]
        return unit_rows(short) if options.normalize else short

    async def tokens(
        self, texts: Sequence[str], prompt: str, special: bool, context: RequestContext
    ) -> list[list[Token]]:
        """Return the tokens of texts, of which there may be as many as may wait."""
        self._check_texts(texts)
        limit = self.config.batching.queue_tokens
        found = 0

        def part_tokens(part: Sequence[str]) -> list[list[Token]]:
            nonlocal found
            if found > limit:
                return []
            rows = self.engine.tokens(part, prompt, special=special)
            found += sum(map(len, rows))
            return rows

        rows = await self._in_turns(texts, part_tokens)
        if found > limit:
            message = f"the texts have more than {limit} tokens; send several requests"
            raise RequestError(413, message, "too_many_tokens", "input")
        context.texts, context.tokens = len(rows), found
        return rows

    async def _items(self, content: Inputs, options: EmbedOptions) -> list[Item]:
        if isinstance(content, str):
            content = [content]
        if not content or isinstance(content[0], str):
            texts = cast(list[str], content)
            self._check_texts(texts)
            items = await self._in_turns(texts, lambda part: self.engine.prepare(part, options))
        else:
            if options.task is not None or options.prompt or options.input_type == "query":
                message = "token ids are embedded as documents, bare"
                message = f"{message}; send texts with an instruction"
                raise RequestError(400, message, "ids_with_instruction", "instruction")
            if not self.engine.takes_ids:
                message = "this model takes texts, no token ids; send texts"
                raise RequestError(400, message, "no_ids", "input")
            single = isinstance(content[0], int)
            rows = cast(list[list[int]], [content] if single else content)
            self._check_count(len(rows))
            items = await self._in_turns(rows, lambda part: self.engine.prepare_ids(part, options))
        limit = self.engine.max_tokens
        for row, item in enumerate(items):
            if item.tokens > limit:  # was not to be cut
                message = f"text {row} has {item.tokens} tokens, the model takes {limit}"
                message = f"{message}; split it or let it be cut"
                raise RequestError(413, message, "text_too_long", "input")
        return items

    def _check_texts(self, texts: Sequence[str]) -> None:
        self._check_count(len(texts))
        limit = self.config.limits.max_text_chars
        for row, text in enumerate(texts):
            if not text.strip():
                raise RequestError(400, f"text {row} is empty; leave it out", "empty_text", "input")
            if len(text) > limit:
                message = f"text {row} has {len(text)} characters, this server takes {limit}"
                raise RequestError(413, f"{message}; split it", "text_too_long", "input")

    def _check_count(self, count: int) -> None:
        limit = self.config.limits.max_texts
        if count == 0:
            raise RequestError(400, "an empty list; send at least one text", "no_texts", "input")
        if count > limit:
            message = f"{count} texts, this server takes {limit} per request"
            raise RequestError(413, f"{message}; send several requests", "too_many_texts", "input")

    async def _in_turns(
        self, rows: Sequence[SizedT], prepare: Callable[[Sequence[SizedT]], list[T]]
    ) -> list[T]:
        """Call the tokenizer for slices of the rows, off the event loop where there are many."""

        def in_turn(part: Sequence[SizedT]) -> list[T]:
            with self._tokenising:
                return prepare(part)

        try:
            if sum(map(len, rows)) <= _SMALL_CHARS and self._tokenising.acquire(blocking=False):
                try:
                    return prepare(rows)
                finally:
                    self._tokenising.release()
            loop, items, start = asyncio.get_running_loop(), list[T](), 0
            while start < len(rows):
                stop, size = start, 0
                while stop < len(rows) and size < _SLICE_CHARS:
                    size += len(rows[stop])
                    stop += 1
                part = rows[start:stop]
                items += await loop.run_in_executor(self._tokeniser, in_turn, part)
                start = stop
        except UserError as error:
            raise RequestError(400, str(error), param="input") from error
        return items


async def finish(
    request: Request, work: Coroutine[Any, Any, T], seconds: float, metrics: Metrics
) -> T:
    """Run the work of a request, or cancel it when its client is gone or time is over."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_wait_until_gone(request))
    try:
        await asyncio.wait((task, gone), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            metrics.cancelled.inc()
            raise ClientGoneError
        message = f"not ready after {seconds:g} seconds; send fewer texts, or again later"
        raise RequestError(503, message, "timeout", retry_seconds=5)
    finally:
        task.cancel()
        gone.cancel()


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
