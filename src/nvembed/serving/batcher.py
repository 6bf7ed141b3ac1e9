"""Between requests (event loop) and the model (its threads): who waits, runs, fails or left.

In: items of a request; out: their vectors. The order is ``batching.py``'s; this file has the lock,
the threads and the futures. A request whose client left is dropped from the queue; one on which
the model fails is told so alone, since its batch is run again request by request.

A thread that is free takes at once whatever waits; what comes meanwhile is the next batch. So a
lone text never waits for company, and batches grow with the load by themselves.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from nvembed.serving.batching import Job, Scheduler, Slot
from nvembed.serving.engines import EncoderEngine, Item
from nvembed.serving.errors import RequestError
from nvembed.serving.telemetry import Metrics, log_event

_Vectors = NDArray[np.float32]


@dataclass(eq=False, slots=True, kw_only=True)
class _Request(Job):
    """A job whose vectors somebody waits for, unless it is cancelled."""

    items: Sequence[Item]
    future: asyncio.Future[_Vectors]
    vectors: _Vectors  # (len(items), dimension), filled batch by batch
    missing: int  # rows of it


_Settled = tuple[_Request, RequestError | None]


class Batcher:
    """Runs an engine in threads of its own, on batches that a scheduler makes for it alone."""

    def __init__(self, engine: EncoderEngine, scheduler: Scheduler, metrics: Metrics) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._metrics = metrics
        metrics.queued_tokens.set_function(lambda: scheduler.waiting_tokens)
        metrics.queued_requests.set_function(lambda: scheduler.waiting_jobs)
        self._condition = threading.Condition()
        self._closing = False
        self._tokens_per_second = 1000.0  # of one thread; until something was measured
        self._threads = [
            threading.Thread(target=self._work, name=f"nvembed-model-{number}", daemon=True)
            for number in range(engine.forwards)
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Finish what is queued, then stop the threads."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        for thread in self._threads:
            thread.join()

    @property
    def ready(self) -> bool:
        """Whether requests are taken: the threads are alive and the queue has room."""
        return (
            all(thread.is_alive() for thread in self._threads)
            and not self._closing
            and self._scheduler.waiting_tokens < self._scheduler.queue_tokens
        )

    async def embed(self, items: Sequence[Item], client: Hashable) -> _Vectors:
        """Queue the items of a request and wait for their vectors: ``(len(items), dimension)``.

        Cancelling it takes them out of the queue. A RequestError says that the queue is full (429)
        or that the model failed on this request (503).
        """
        request = _Request(
            client,
            [item.tokens for item in items],
            items=items,
            future=asyncio.get_running_loop().create_future(),
            vectors=np.empty((len(items), self._engine.dimension), dtype=np.float32),
            missing=len(items),
        )
        with self._condition:
            taken = not self._closing and self._scheduler.add(request, time.monotonic())
            if taken:
                self._condition.notify()
        if not taken:
            raise self._overloaded()
        try:
            return await request.future
        finally:
            with self._condition:
                self._scheduler.cancel(request)

    def _overloaded(self) -> RequestError:
        speed = self._tokens_per_second * len(self._threads)
        wait = min(60.0, self._scheduler.waiting_tokens / speed)
        message = "too many texts are waiting; send this request again after Retry-After seconds"
        return RequestError(429, message, "overloaded", retry_seconds=wait)

    # --- the model's threads ----------------------------------------------------------------------

    def _work(self) -> None:
        while (batch := self._next_batch()) is not None:
            self._run(batch)

    def _next_batch(self) -> list[Slot] | None:
        with self._condition:
            while True:
                now = time.monotonic()
                start = self._scheduler.ready_at(now)
                if start is None:
                    if self._closing:
                        return None
                    self._condition.wait()
                elif start > now and not self._closing:
                    self._condition.wait(start - now)
                else:
                    break
            batch = self._scheduler.take()
            if self._scheduler.waiting_jobs:
                self._condition.notify()  # for the next thread
        for job, row in batch:
            if row == 0:
                self._metrics.queue_seconds.observe(now - job.arrived)
        return batch

    def _run(self, batch: Sequence[Slot]) -> None:
        rows_of: dict[_Request, list[int]] = {}
        for job, row in batch:
            if not job.cancelled:
                rows_of.setdefault(cast(_Request, job), []).append(row)
        parts = [[request.items[row] for row in rows] for request, rows in rows_of.items()]
        vectors = self._forward([item for part in parts for item in part])
        settled: list[_Settled] = []
        at = 0
        for (request, rows), part in zip(rows_of.items(), parts, strict=True):
            if vectors is not None:
                own: _Vectors | None = vectors[at : at + len(part)]
            else:
                own = self._forward(part) if len(parts) > 1 else None
            at += len(part)
            error = self._keep(request, rows, own)
            if error is not None or not request.missing:
                settled.append((request, error))
        if settled:  # the event loop is woken once per batch
            settled[0][0].future.get_loop().call_soon_threadsafe(_settle, settled)

    def _forward(self, items: Sequence[Item]) -> _Vectors | None:
        """Run the model; ``None`` where it failed."""
        if not items:
            return None
        tokens = sum(item.tokens for item in items)
        start = time.perf_counter()
        try:
            vectors = np.asarray(self._engine.embed(items), dtype=np.float32)
            fault = None if vectors.shape == (len(items), self._engine.dimension) else "shape"
        except Exception as error:  # whatever a model can raise; the server goes on
            fault = type(error).__name__
        if fault is not None:
            log_event("model_fault", error=fault, texts=len(items), tokens=tokens)
            return None
        seconds = time.perf_counter() - start
        self._metrics.model_seconds.observe(seconds)
        self._metrics.batch_tokens.observe(tokens)
        self._metrics.batch_texts.observe(len(items))
        self._tokens_per_second += 0.1 * (tokens / max(seconds, 1e-6) - self._tokens_per_second)
        return vectors

    def _keep(
        self, request: _Request, rows: Sequence[int], vectors: _Vectors | None
    ) -> RequestError | None:
        """Keep the vectors of some rows of a request; return what is wrong with them."""
        if vectors is not None and np.isfinite(vectors).all():
            request.vectors[rows] = vectors
            with self._condition:
                request.missing -= len(rows)
            return None
        self._metrics.faults.inc()
        with self._condition:
            self._scheduler.cancel(request)
        found = "failed on this request"
        if vectors is not None:
            found = "gave NaN or infinity for a text of this request"
        advice = "send other texts, or ask who runs the server to load it in float32"
        return RequestError(503, f"the model {found}; {advice}", "model_fault")


def _settle(settled: Sequence[_Settled]) -> None:
    for request, error in settled:
        if request.future.done():  # its client left, or another part of it failed
            continue
        if error is not None:
            request.future.set_exception(error)
        else:
            request.future.set_result(request.vectors)
