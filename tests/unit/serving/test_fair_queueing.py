"""Fairness of the scheduler, whatever the others do: bounded waits, even shares, bounded memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvembed.serving.batching import Job, Scheduler

VICTIM = "victim"
STARVED = 6000  # tokens; no test has a bound above it

Others = Callable[[Scheduler, list[str]], None]
"""What other clients do between two batches; it is told who of them was in the last one."""


def scheduler(batch_tokens: int) -> Scheduler:
    return Scheduler(batch_tokens=batch_tokens, max_wait=0.0, queue_tokens=10**9)


def add(queue: Scheduler, client: str, *lengths: int) -> Job:
    job = Job(client, lengths)
    assert queue.add(job, 0.0)
    return job


class PlainQueue:
    """The rules in slow plain code: every client is remembered, the least time is looked for."""

    def __init__(self, batch_tokens: int) -> None:
        self.batch_tokens = batch_tokens
        self.clear()

    def clear(self) -> None:
        self.virtual, self.turns = 0.0, 0
        self.start: dict[str, float] = {}
        self.turn: dict[str, int] = {}
        self.waiting: dict[str, list[tuple[Job, int]]] = {}

    def add(self, job: Job) -> None:
        client = str(job.client)
        if not self.waiting.get(client):
            self.start[client] = max(self.start.get(client, 0.0), self.virtual)
            self.turns += 1
            self.turn[client] = self.turns
        slots = [(job, row) for row in range(len(job.lengths))]
        self.waiting.setdefault(client, []).extend(slots)

    def cancel(self, job: Job) -> None:
        client = str(job.client)
        self.waiting[client] = [slot for slot in self.waiting.get(client, []) if slot[0] is not job]
        if not any(self.waiting.values()):
            self.clear()

    def take(self) -> list[tuple[Job, int]]:
        batch: list[tuple[Job, int]] = []
        room = self.batch_tokens
        while there := [client for client, slots in self.waiting.items() if slots]:
            first = min(there, key=lambda client: (self.start[client], self.turn[client]))
            self.virtual = max(self.virtual, self.start[first])
            job, row = self.waiting[first][0]
            if batch and job.lengths[row] > room:
                return batch
            batch.append(self.waiting[first].pop(0))
            room -= job.lengths[row]
            self.virtual += job.lengths[row] / len(there)
            self.start[first] += job.lengths[row]
            self.turns += 1
            self.turn[first] = self.turns
        self.clear()
        return batch


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "add", "take", "take", "cancel"]),
            st.integers(0, 4),
            st.lists(st.integers(1, 20), min_size=1, max_size=5),
        ),
        max_size=60,
    ),
    st.integers(1, 25),
)
def test_forgetting_changes_nothing(steps, batch_tokens: int) -> None:
    queue, plain = scheduler(batch_tokens), PlainQueue(batch_tokens)
    jobs: list[Job] = []
    for step, number, lengths in steps:
        if step == "add":
            jobs.append(add(queue, str(number), *lengths))
            plain.add(jobs[-1])
        elif step == "take":
            assert queue.take() == plain.take()
        elif number < len(jobs):
            queue.cancel(jobs[-1 - number])
            plain.cancel(jobs[-1 - number])
    while queue.waiting_jobs:
        assert queue.take() == plain.take()


def test_a_client_that_comes_back_has_what_it_was_served() -> None:
    queue = scheduler(10)
    add(queue, "bulk", *[10] * 300)
    add(queue, "back", 1000)
    while "back" not in [job.client for job, _ in queue.take()]:
        pass
    add(queue, "back", 10)
    served = 0
    while "back" not in [job.client for job, _ in queue.take()]:
        served += 10
    assert 980 <= served <= 1010  # an even share of what both were served


def returning(count: int, length: int) -> Others:
    """So many connections of one text each, which send the next as soon as one is answered."""
    began = False

    def act(queue: Scheduler, served: list[str]) -> None:
        nonlocal began
        names = served if began else [f"back {number}" for number in range(count)]
        began = True
        for name in names:
            add(queue, name, length)

    return act


def strangers(count: int, length: int) -> Others:
    """Before every batch so many clients that were never seen and never come back."""
    numbers = iter(range(10**9))

    def act(queue: Scheduler, served: list[str]) -> None:
        while queue.waiting_jobs <= count:
            add(queue, f"stranger {next(numbers)}", length)

    return act


def undecided(count: int, length: int) -> Others:
    """Clients that leave and return with the same text before every batch."""
    jobs: dict[str, Job] = {}

    def act(queue: Scheduler, served: list[str]) -> None:
        for number in range(count):
            name = f"undecided {number}"
            if name in jobs:
                queue.cancel(jobs[name])
            jobs[name] = add(queue, name, length, length)

    return act


def steady(count: int, length: int) -> Others:
    """Clients with requests of many texts, one after the other."""

    def act(queue: Scheduler, served: list[str]) -> None:
        for number in range(count):
            if queue.waiting_tokens < 1000 * length * count:
                add(queue, f"steady {number}", *[length] * 100)

    return act


KINDS = {kind.__name__: kind for kind in (returning, strangers, undecided, steady)}


def waits(queue: Scheduler, victim: Job, others: Others) -> Iterator[int]:
    """For each text of a request, give the tokens of others that were served before it."""
    served: list[str] = []
    waited = 0
    while victim.next_row < len(victim.lengths):
        others(queue, served)
        served = []
        for job, row in queue.take():
            if job is victim:
                yield waited
                waited = 0
            else:
                served.append(str(job.client))
                waited += job.lengths[row]
        assert waited <= STARVED


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    count=st.integers(1, 6),
    length=st.integers(1, 60),
    own=st.integers(1, 60),
    batch_tokens=st.integers(1, 100),
)
def test_every_wait_is_bounded(kind: str, count: int, length: int, own: int, batch_tokens) -> None:
    queue = scheduler(batch_tokens)
    others = KINDS[kind](count, length)
    others(queue, [])
    served = [str(job.client) for job, _ in queue.take()]
    victim = add(queue, VICTIM, *[own] * 30)
    if kind == "returning":
        others(queue, served)
    for wait in waits(queue, victim, others):
        assert wait <= 2 * (count + 1) * max(length, own)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=5), st.integers(1, 100))
def test_shares_are_even_in_tokens(lengths: list[int], batch_tokens: int) -> None:
    queue = scheduler(batch_tokens)
    for number, length in enumerate(lengths):
        add(queue, str(number), *[length] * (20_000 // length))
    served: Counter[str] = Counter()
    while sum(served.values()) < 4000:
        for job, row in queue.take():
            served[str(job.client)] += job.lengths[row]
        most, least = max(served.values()), min(served[str(n)] for n in range(len(lengths)))
        assert most - least <= 2 * max(lengths)


@pytest.mark.parametrize("kind", ["returning", "strangers", "steady"])
def test_a_long_request_gets_its_share(kind: str) -> None:
    # A batch holds one text of the others: what they send is answered and comes back at once.
    queue = scheduler(1024)
    victim = add(queue, VICTIM, *[128] * 100)
    total = sum(victim.lengths) + sum(waits(queue, victim, KINDS[kind](2, 1000)))
    assert total <= 3 * sum(victim.lengths) + 3000


def test_a_long_text_does_not_pay_for_what_was_free() -> None:
    # Nobody waited while it was served, so its client owes nothing.
    queue = scheduler(10)
    add(queue, "a", 1000)
    assert queue.take()
    late, back = add(queue, "b", 5, 5), add(queue, "a", 5)
    assert queue.take() == [(late, 0), (back, 0)]


def test_clients_that_went_away_are_forgotten() -> None:
    queue = scheduler(100)
    victim = add(queue, VICTIM, *[7] * 10_000)
    act = strangers(5, 11)
    served = 0
    while victim.next_row < 5000:
        act(queue, [])
        served += sum(job is not victim for job, _ in queue.take())
        assert len(queue.clients) <= 20
    assert served > 2000
    queue.cancel(victim)
    while queue.take():
        pass
    assert len(queue.clients) == 0
    for number in range(1000):  # an idle server, many clients
        add(queue, str(number), 50)
        queue.take()
        assert len(queue.clients) == 0


def test_leaving_and_returning_does_not_fill_the_memory() -> None:
    queue = scheduler(10)
    add(queue, VICTIM, *[10] * 50)
    queue.take()
    for _ in range(1000):
        queue.cancel(add(queue, "undecided", 10))
    assert len(queue.clients) == 2
    assert len(queue._turns) == 2
