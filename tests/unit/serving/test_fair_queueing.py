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
        assert queue.known_clients <= 20
    assert served > 2000
    queue.cancel(victim)
    while queue.take():
        pass
    assert queue.known_clients == 0
    for number in range(1000):  # an idle server, many clients
        add(queue, str(number), 50)
        queue.take()
        assert queue.known_clients == 0


def test_leaving_and_returning_does_not_fill_the_memory() -> None:
    queue = scheduler(10)
    add(queue, VICTIM, *[10] * 50)
    queue.take()
    for _ in range(1000):
        queue.cancel(add(queue, "undecided", 10))
    assert queue.known_clients == 2
    assert len(queue._turns) == 2
