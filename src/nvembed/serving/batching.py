"""The queue between requests (on the event loop) and the model (in threads of its own).

``Scheduler`` decides which texts go into the next forward: fair between clients, within a token
budget, without threads or a clock. ``Batcher`` has the lock, the threads and the futures.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from numpy.typing import NDArray

from nvembed.serving.engines import EncoderEngine, Item
from nvembed.serving.errors import RequestError
from nvembed.serving.telemetry import Metrics, log_event

_Vectors = NDArray[np.float32]
Slot = tuple["Job", int]  # a job and the row of one of its texts


@dataclass(eq=False, slots=True)
class Job:
    """The texts of one request."""

    client: Hashable  # whose it is, for fairness
    lengths: Sequence[int]  # tokens of each text, at least 1
    arrived: float = 0.0  # clock when it was added
    cancelled: bool = False  # nobody waits for it any more; its texts are skipped
    next_row: int = 0  # the first text that was not taken yet

    @property
    def waiting_tokens(self) -> int:
        """Tokens of the texts that were not taken yet."""
        return sum(self.lengths[self.next_row :])


@dataclass(eq=False, slots=True)
class _Client:
    """What a client waits for, and when its turn is."""

    start: float  # its virtual time, where its next text starts
    turn: int  # of two clients at one time, the one with the lesser number comes first
    jobs: deque[Job] = field(default_factory=deque)


class Scheduler:
    """The bounded queue in front of the model, by start-time fair queueing.

    Every client has a virtual time, the tokens it was served; who has the least comes next, text by
    text, so a request of 2,048 texts takes turns with the single texts of others. A client that
    comes back goes on at its own time or the queue's, whichever is later: nobody saves up a right
    to the machine, or gets rid of what he had by leaving for a moment.

    The queue's time grows by each text's tokens, shared out among the clients that wait: it passes
    whoever waits after a bounded number of tokens, even where ever new clients come. A client is
    forgotten when it has passed him, or when nobody waits.
    """

    def __init__(self, *, batch_tokens: int, max_wait: float, queue_tokens: int) -> None:
        self.batch_tokens = batch_tokens  # of a batch; a longer text goes alone
        self.max_wait = max_wait  # seconds for a batch to fill while the model is idle
        self.queue_tokens = queue_tokens  # that may wait
        self.waiting_tokens = 0
        self.waiting_jobs = 0
        # Those that wait, and those that left and had more than these.
        self.clients: dict[Hashable, _Client] = {}
        # One entry per client; what it says may be earlier than the client's own start by now.
        self._turns: list[tuple[float, int, Hashable]] = []
        self._turn = itertools.count()
        self._waiting_clients = 0
        self._virtual = 0.0

    def has_room(self, tokens: int) -> bool:
        """Tell whether a job of so many tokens would be taken; an empty queue takes any."""
        return not self.waiting_tokens or self.waiting_tokens + tokens <= self.queue_tokens

    def add(self, job: Job, now: float) -> bool:
        """Queue a job; return whether there was room for it."""
        tokens = job.waiting_tokens
        if not self.has_room(tokens):
            return False
        job.arrived = now
        client = self.clients.get(job.client)
        if client is None:
            client = self.clients[job.client] = _Client(self._virtual, next(self._turn))
            heapq.heappush(self._turns, (client.start, client.turn, job.client))
        elif not client.jobs:  # its entry is corrected when it is reached
            client.start, client.turn = max(client.start, self._virtual), next(self._turn)
        if not client.jobs:
            self._waiting_clients += 1
        client.jobs.append(job)
        self.waiting_tokens += tokens
        self.waiting_jobs += 1
        return True

    def cancel(self, job: Job) -> None:
        """Drop what was not taken of a job."""
        if job.cancelled:
            return
        job.cancelled = True
        client = self.clients.get(job.client)
        if client is not None and job in client.jobs:
            client.jobs.remove(job)
            self.waiting_tokens -= job.waiting_tokens
            self.waiting_jobs -= 1
            self._waiting_clients -= not client.jobs
            self._forget_if_empty()

    def ready_at(self, now: float) -> float | None:
        """Tell when the next batch should start (full, or ``max_wait`` over); ``None``: nothing."""
        if not self.waiting_jobs:
            return None
        if self.waiting_tokens >= self.batch_tokens:
            return now
        oldest = min(client.jobs[0].arrived for client in self.clients.values() if client.jobs)
        return max(now, oldest + self.max_wait)

    def take(self) -> list[Slot]:
        """Take the next batch: at most ``batch_tokens``, or one text that is longer."""
        batch: list[Slot] = []
        room = self.batch_tokens
        while (client := self._next_client()) is not None:
            job = client.jobs[0]
            length = job.lengths[job.next_row]
            if batch and length > room:
                break  # passing over long texts, they would wait for ever
            batch.append((job, job.next_row))
            room -= length
            self._virtual += length / self._waiting_clients
            client.start, client.turn = client.start + length, next(self._turn)
            job.next_row += 1
            self.waiting_tokens -= length
            if job.next_row == len(job.lengths):
                client.jobs.popleft()
                self.waiting_jobs -= 1
                self._waiting_clients -= not client.jobs
        self._forget_if_empty()
        return batch

    def _next_client(self) -> _Client | None:
        """Return the client whose turn it is; its entry is the first then."""
        while self._turns:
            start, turn, name = self._turns[0]
            client = self.clients[name]
            if (client.start, client.turn) != (start, turn):
                heapq.heapreplace(self._turns, (client.start, client.turn, name))
            elif not client.jobs:
                # Whoever is found starts no earlier, so neither does this client if it returns.
                heapq.heappop(self._turns)
                del self.clients[name]
            else:
                self._virtual = max(self._virtual, start)
                return client
        return None

    def _forget_if_empty(self) -> None:
        """Begin anew where nobody waits: what a client had is taken from nobody then."""
        if not self.waiting_jobs:
            self.clients.clear()
            self._turns.clear()
            self._virtual = 0.0


# --- Threads --------------------------------------------------------------------------------------


@dataclass(eq=False, slots=True, kw_only=True)
class _Request(Job):
    """A job whose vectors somebody waits for, unless it is cancelled."""

    items: Sequence[Item]
    future: asyncio.Future[_Vectors]
    vectors: _Vectors  # (len(items), dimension), filled batch by batch
    missing: int  # rows of it


_Part = tuple[_Request, list[int]]  # a request and rows of it


class Batcher:
    """Runs an engine in threads of its own, on batches that a scheduler makes for it alone.

    A thread that is free takes at once whatever waits, so a lone text never waits for company. A
    batch on which the model fails is run again request by request.
    """

    def __init__(self, engine: EncoderEngine, scheduler: Scheduler, metrics: Metrics) -> None:
        self._engine = engine
        self.scheduler = scheduler
        self._metrics = metrics
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
            and self.scheduler.waiting_tokens < self.scheduler.queue_tokens
        )

    async def embed(self, items: Sequence[Item], client: Hashable) -> _Vectors:
        """Queue the items of a request and wait for ``(len(items), dimension)``; may be cancelled.

        A RequestError says that the queue is full (429) or that the model failed on it (503).
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
            taken = not self._closing and self.scheduler.add(request, time.monotonic())
            if taken:
                self._condition.notify()
        if not taken:
            speed = self._tokens_per_second * len(self._threads)
            wait = min(60.0, self.scheduler.waiting_tokens / speed)
            message = (
                "too many texts are waiting; send this request again after Retry-After seconds"
            )
            raise RequestError(429, message, "overloaded", retry_seconds=wait)
        try:
            return await request.future
        finally:
            with self._condition:
                self.scheduler.cancel(request)

    # --- the model's threads ----------------------------------------------------------------------

    def _work(self) -> None:
        while (batch := self._next_batch()) is not None:
            self._run(batch)

    def _run(self, batch: Sequence[Slot]) -> None:
        rows_of: dict[_Request, list[int]] = {}
        for job, row in batch:
            if not job.cancelled:
                rows_of.setdefault(cast(_Request, job), []).append(row)
        parts = list(rows_of.items())
        vectors = self._forward(parts) if parts else None
        if vectors is not None or len(parts) == 1:
            self._keep(parts, vectors)
            return
        for part in parts:  # one of them spoils the batch
            self._keep([part], self._forward([part]))

    def _next_batch(self) -> list[Slot] | None:
        with self._condition:
            while True:
                now = time.monotonic()
                start = self.scheduler.ready_at(now)
                if start is None:
                    if self._closing:
                        return None
                    self._condition.wait()
                elif start > now and not self._closing:
                    self._condition.wait(start - now)
                else:
                    break
            batch = self.scheduler.take()
            if self.scheduler.waiting_jobs:
                self._condition.notify()  # for the next thread
        for job, row in batch:
            if row == 0:
                self._metrics.queue_seconds.observe(now - job.arrived)
        return batch

    def _forward(self, parts: Sequence[_Part]) -> _Vectors | None:
        """Run the model; ``None`` where it failed."""
        items = [request.items[row] for request, rows in parts for row in rows]
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

    def _keep(self, parts: Sequence[_Part], vectors: _Vectors | None) -> None:
        """Keep the vectors of rows of requests; wake those that have all, or that failed."""
        settled: list[tuple[_Request, RequestError | None]] = []
        at = 0
        for request, rows in parts:
            own = None if vectors is None else vectors[at : at + len(rows)]
            at += len(rows)
            if own is not None and np.isfinite(own).all():
                request.vectors[rows] = own
                with self._condition:
                    request.missing -= len(rows)
                if not request.missing:
                    settled.append((request, None))
                continue
            self._metrics.faults.inc()
            with self._condition:
                self.scheduler.cancel(request)
            found = "failed on this request"
            if own is not None:
                found = "gave NaN or infinity for a text of this request"
            advice = "send other texts, or ask who runs the server to load it in float32"
            error = RequestError(503, f"the model {found}; {advice}", "model_fault")
            settled.append((request, error))
        if settled:  # the event loop is woken once per batch
            settled[0][0].future.get_loop().call_soon_threadsafe(_settle, settled)


def _settle(settled: Sequence[tuple[_Request, RequestError | None]]) -> None:
    for request, error in settled:
        if request.future.done():  # its client left, or another part of it failed
            continue
        if error is not None:
            request.future.set_exception(error)
        else:
            request.future.set_result(request.vectors)
