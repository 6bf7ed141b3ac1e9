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
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nvembed.serving.batching import Job, Scheduler, Slot
from nvembed.serving.engine import Engine, Item
from nvembed.serving.errors import RequestError
from nvembed.serving.logs import log_event
from nvembed.serving.metrics import Metrics

_Vectors = NDArray[np.float32]

_NOT_FINITE = "the model gave NaN or infinity for a text of this request"


@dataclass(eq=False, slots=True)
class _Waiting:
    items: Sequence[Item]
    future: asyncio.Future[_Vectors]
    loop: asyncio.AbstractEventLoop
    vectors: _Vectors
    missing: int


class Batcher:
    """Runs an engine in threads of its own, on batches that a scheduler makes.

    Args:
        engine: the model.
        scheduler: the queue; nobody else may touch it.
        metrics: where batches and waits are counted.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        engine: Engine,
        scheduler: Scheduler,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._metrics = metrics
        self._clock = clock
        self._condition = threading.Condition()
        self._waiting: dict[Job, _Waiting] = {}
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
        """Queue the items of a request and wait for their vectors.

        Cancelling it takes them out of the queue.

        Returns:
            ``(len(items), dimension)`` float32.

        Raises:
            RequestError: the queue is full (429), or the model failed on this request (503).
        """
        loop = asyncio.get_running_loop()
        job = Job(client, [item.tokens for item in items])
        vectors = np.empty((len(items), self._engine.dimension), dtype=np.float32)
        waiting = _Waiting(items, loop.create_future(), loop, vectors, len(items))
        with self._condition:
            taken = not self._closing and self._scheduler.add(job, self._clock())
            if taken:
                self._waiting[job] = waiting
                self._show_queue()
                self._condition.notify()
        if not taken:
            raise self._overloaded()
        try:
            return await waiting.future
        finally:
            with self._condition:
                self._scheduler.cancel(job)
                self._waiting.pop(job, None)
                self._show_queue()

    def _overloaded(self) -> RequestError:
        speed = self._tokens_per_second * len(self._threads)
        wait = self._scheduler.waiting_tokens / speed
        return RequestError(
            429,
            "too many texts are waiting; send this request again after Retry-After seconds",
            code="overloaded",
            retry_seconds=min(60.0, wait),
        )

    # --- the model's threads ----------------------------------------------------------------------

    def _work(self) -> None:
        while (batch := self._next_batch()) is not None:
            self._run(batch)

    def _next_batch(self) -> list[Slot] | None:
        with self._condition:
            while True:
                now = self._clock()
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
            self._show_queue()
            for job, row in batch:
                if row == 0:
                    self._metrics.queue_seconds.observe(now - job.arrived)
            return batch

    def _show_queue(self) -> None:
        self._metrics.queued_tokens.set(self._scheduler.waiting_tokens)
        self._metrics.queued_requests.set(self._scheduler.waiting_jobs)

    def _run(self, batch: Sequence[Slot]) -> None:
        rows_of: dict[Job, list[int]] = {}
        for job, row in batch:
            rows_of.setdefault(job, []).append(row)
        with self._condition:
            known = [(job, self._waiting.get(job), rows) for job, rows in rows_of.items()]
        parts = [(job, waiting, rows) for job, waiting, rows in known if waiting is not None]
        if not parts:
            return
        items = [waiting.items[row] for _, waiting, rows in parts for row in rows]
        vectors = self._forward(items)
        settled: list[tuple[_Waiting, RequestError | None]] = []
        at = 0
        for job, waiting, rows in parts:
            if vectors is not None:
                own: _Vectors | None = vectors[at : at + len(rows)]
            elif len(parts) > 1:
                own = self._forward([waiting.items[row] for row in rows])
            else:
                own = None
            at += len(rows)
            self._note(job, waiting, rows, own, settled)
        if settled:  # the event loop is woken once per batch
            settled[0][0].loop.call_soon_threadsafe(_settle, settled)

    def _forward(self, items: Sequence[Item]) -> _Vectors | None:
        """Run the model; ``None`` where it failed."""
        tokens = sum(item.tokens for item in items)
        start = time.perf_counter()
        try:
            vectors = np.asarray(self._engine.embed(items), dtype=np.float32)
        except Exception as error:  # whatever a model can raise; the server goes on
            log_event("model_fault", error=type(error).__name__, texts=len(items), tokens=tokens)
            return None
        seconds = time.perf_counter() - start
        if vectors.shape != (len(items), self._engine.dimension):
            log_event("model_fault", error="shape", texts=len(items), tokens=tokens)
            return None
        self._metrics.model_seconds.observe(seconds)
        self._metrics.batch_tokens.observe(tokens)
        self._metrics.batch_texts.observe(len(items))
        self._tokens_per_second += 0.1 * (tokens / max(seconds, 1e-6) - self._tokens_per_second)
        return vectors

    def _note(
        self,
        job: Job,
        waiting: _Waiting,
        rows: Sequence[int],
        vectors: _Vectors | None,
        settled: list[tuple[_Waiting, RequestError | None]],
    ) -> None:
        """Keep the vectors of some rows of a request; add it to ``settled`` where it is done."""
        if vectors is None or not np.isfinite(vectors).all():
            message = "the model failed on this request" if vectors is None else _NOT_FINITE
            self._metrics.faults.inc()
            with self._condition:
                self._scheduler.cancel(job)
            advice = "send other texts, or ask who runs the server to load it in float32"
            error = RequestError(503, f"{message}; {advice}", code="model_fault")
            settled.append((waiting, error))
            return
        waiting.vectors[rows] = vectors
        with self._condition:
            waiting.missing -= len(rows)
            done = not waiting.missing
        if done:
            settled.append((waiting, None))


def _settle(settled: Sequence[tuple[_Waiting, RequestError | None]]) -> None:
    for waiting, error in settled:
        if waiting.future.done():  # its client left, or another part of it failed
            continue
        if error is not None:
            waiting.future.set_exception(error)
        else:
            waiting.future.set_result(waiting.vectors)
