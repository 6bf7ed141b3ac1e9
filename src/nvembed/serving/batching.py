"""Which texts go into the next forward: fair between clients, within a token budget.

In: jobs (one request's texts as token counts); out: batches of (job, row). Pure: no threads, no
clock of its own (``now`` is given), so its rules are tested step by step.

Fairness is start-time fair queueing: every client has a virtual time, the tokens it was served, and
the client with the least comes next, text by text. So a request of 2,048 texts takes turns with the
single texts of others. A client that comes back goes on at its own time or that of the queue,
whichever is later: nobody saves up a right to the machine, and nobody gets rid of what he had by
leaving for a moment. Within a client, first come, first served.

The queue's own time grows by each text's tokens, shared out among the clients that wait. It thus
passes whoever waits after a bounded number of tokens, even where ever new clients come, and a
client is forgotten when it has passed him, or when nobody waits.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

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
    """A client that waits, or that left and had more than those who wait."""

    start: float  # its virtual time, where its next text starts
    turn: int  # of two clients at one time, the one with the lesser number comes first
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
        # One entry per client; what it says may be earlier than the client's own start by now.
        self._turns: list[tuple[float, int, Hashable]] = []
        self._turn = 0
        self._waiting_clients = 0
        self._virtual = 0.0

    @property
    def known_clients(self) -> int:
        """Clients that are remembered: those that wait, and those that had more than these."""
        return len(self._clients)

    def has_room(self, tokens: int) -> bool:
        """Tell whether a job of so many tokens would be taken; an empty queue takes any."""
        return not self.waiting_tokens or self.waiting_tokens + tokens <= self.queue_tokens

    def add(self, job: Job, now: float) -> bool:
        """Queue a job; return whether there was room for it."""
        tokens = job.waiting_tokens
        if not self.has_room(tokens):
            return False
        job.arrived = now
        client = self._clients.get(job.client)
        if client is None:
            client = self._clients[job.client] = _Client(self._virtual, self._next_turn())
            heapq.heappush(self._turns, (client.start, client.turn, job.client))
        elif not client.jobs:  # its entry is corrected when it is reached
            client.start, client.turn = max(client.start, self._virtual), self._next_turn()
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
        client = self._clients.get(job.client)
        if client is not None and job in client.jobs:
            client.jobs.remove(job)
            self.waiting_tokens -= job.waiting_tokens
            self.waiting_jobs -= 1
            self._waiting_clients -= not client.jobs
            self._forget_if_empty()

    def ready_at(self, now: float) -> float | None:
        """Tell when the next batch should start: ``now``, later, or ``None`` with nothing queued.

        At once where a batch is full; otherwise when the text that waited longest has waited
        ``max_wait``.
        """
        if not self.waiting_jobs:
            return None
        if self.waiting_tokens >= self.batch_tokens:
            return now
        oldest = min(client.jobs[0].arrived for client in self._clients.values() if client.jobs)
        return max(now, oldest + self.max_wait)

    def take(self) -> list[Slot]:
        """Take the next batch: at most ``batch_tokens``, or one text that is longer.

        A turn whose text does not fit any more ends the batch, so that long texts are not passed
        over for ever.
        """
        batch: list[Slot] = []
        room = self.batch_tokens
        while (client := self._next_client()) is not None:
            job = client.jobs[0]
            length = job.lengths[job.next_row]
            if batch and length > room:
                break
            batch.append((job, job.next_row))
            room -= length
            self._serve(client, job, length)
        self._forget_if_empty()
        return batch

    def _next_client(self) -> _Client | None:
        """Return the client whose turn it is; its entry is the first then."""
        while self._turns:
            start, turn, name = self._turns[0]
            client = self._clients[name]
            if (client.start, client.turn) != (start, turn):
                heapq.heapreplace(self._turns, (client.start, client.turn, name))
            elif not client.jobs:
                # Whoever is found starts no earlier, so neither does this client if it returns.
                heapq.heappop(self._turns)
                del self._clients[name]
            else:
                self._virtual = max(self._virtual, start)
                return client
        return None

    def _serve(self, client: _Client, job: Job, length: int) -> None:
        self._virtual += length / self._waiting_clients
        client.start, client.turn = client.start + length, self._next_turn()
        job.next_row += 1
        self.waiting_tokens -= length
        if job.next_row == len(job.lengths):
            client.jobs.popleft()
            self.waiting_jobs -= 1
            self._waiting_clients -= not client.jobs

    def _forget_if_empty(self) -> None:
        """Begin anew where nobody waits: what a client had is taken from nobody then."""
        if not self.waiting_jobs:
            self._clients.clear()
            self._turns.clear()
            self._virtual = 0.0

    def _next_turn(self) -> int:
        self._turn += 1
        return self._turn
