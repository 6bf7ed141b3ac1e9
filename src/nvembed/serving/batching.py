"""Which texts go into the next forward: fair between clients, within a token budget.

In: jobs (one request's texts as token counts); out: batches of (job, row). Pure: no threads, no
clock of its own (``now`` is given), so its rules are tested step by step.

Fairness is start-time fair queueing: every client has a virtual time that grows by the tokens it
was served, and the client with the least comes next, text by text. So a request of 2,048 texts
takes turns with the single texts of others. A client that comes (back) starts at the time of
those who are there: nobody saves up a right to the machine. Within a client, first come, first
served.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

Slot = tuple["Job", int]  # a job and the row of one of its texts


@dataclass(eq=False, slots=True)
class Job:
    """The texts of one request.

    Attributes:
        client: whose it is, for fairness.
        lengths: tokens of each text, at least 1.
        arrived: clock when it was added.
        cancelled: nobody waits for it any more; its texts are skipped.
        next_row: the first text that was not taken yet.
    """

    client: Hashable
    lengths: Sequence[int]
    arrived: float = 0.0
    cancelled: bool = False
    next_row: int = 0

    @property
    def waiting_tokens(self) -> int:
        """Tokens of the texts that were not taken yet."""
        return sum(self.lengths[self.next_row :])


@dataclass(eq=False, slots=True)
class _Client:
    jobs: deque[Job] = field(default_factory=deque)


class Scheduler:
    """The bounded queue in front of the model.

    Args:
        batch_tokens: tokens of a batch; a longer text goes alone.
        max_wait: seconds a text waits at most for a batch to fill while the model is idle.
        queue_tokens: tokens that may wait.
    """

    def __init__(self, *, batch_tokens: int, max_wait: float, queue_tokens: int) -> None:
        self.batch_tokens = batch_tokens
        self.max_wait = max_wait
        self.queue_tokens = queue_tokens
        self.waiting_tokens = 0
        self.waiting_jobs = 0
        self._clients: dict[Hashable, _Client] = {}
        self._turns: list[tuple[float, int, Hashable, _Client]] = []
        self._turn = 0
        self._now_virtual = 0.0

    def has_room(self, tokens: int) -> bool:
        """Tell whether a job of so many tokens would be taken; an empty queue takes any."""
        return not self.waiting_tokens or self.waiting_tokens + tokens <= self.queue_tokens

    def add(self, job: Job, now: float) -> bool:
        """Queue a job, unless there is no room for it.

        Returns:
            whether it was taken.
        """
        tokens = job.waiting_tokens
        if not self.has_room(tokens):
            return False
        job.arrived = now
        client = self._clients.get(job.client)
        if client is None:
            client = self._clients[job.client] = _Client()
            self._push(job.client, client, self._now_virtual)
        client.jobs.append(job)
        self.waiting_tokens += tokens
        self.waiting_jobs += 1
        return True

    def cancel(self, job: Job) -> None:
        """Drop what was not taken of a job."""
        if job.cancelled:
            return
        job.cancelled = True
        client = self._clients.get(job.client)
        if client is not None and job in client.jobs:
            client.jobs.remove(job)
            self.waiting_tokens -= job.waiting_tokens
            self.waiting_jobs -= 1
            if not client.jobs:
                del self._clients[job.client]

    def ready_at(self, now: float) -> float | None:
        """Tell when the next batch should start: ``now``, later, or ``None`` with nothing queued.

        At once where a batch is full; otherwise when the text that waited longest has waited
        ``max_wait``.
        """
        if not self.waiting_jobs:
            return None
        if self.waiting_tokens >= self.batch_tokens:
            return now
        oldest = min(client.jobs[0].arrived for client in self._clients.values())
        return max(now, oldest + self.max_wait)

    def take(self) -> list[Slot]:
        """Take the next batch: at most ``batch_tokens``, or one text that is longer.

        A turn whose text does not fit any more ends the batch, so that long texts are not passed
        over for ever.
        """
        batch: list[Slot] = []
        room = self.batch_tokens
        while self._turns:
            virtual, _, name, client = self._turns[0]
            if self._clients.get(name) is not client:  # it left, all its jobs cancelled
                heapq.heappop(self._turns)
                continue
            job = client.jobs[0]
            length = job.lengths[job.next_row]
            if batch and length > room:
                break
            heapq.heappop(self._turns)
            self._now_virtual = max(self._now_virtual, virtual)
            batch.append((job, job.next_row))
            room -= length
            job.next_row += 1
            self.waiting_tokens -= length
            if job.next_row == len(job.lengths):
                client.jobs.popleft()
                self.waiting_jobs -= 1
            if client.jobs:
                self._push(name, client, virtual + length)
            else:
                del self._clients[name]
        return batch

    def _push(self, name: Hashable, client: _Client, virtual: float) -> None:
        self._turn += 1
        heapq.heappush(self._turns, (virtual, self._turn, name, client))
