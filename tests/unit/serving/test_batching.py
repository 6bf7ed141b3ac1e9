"""The scheduler step by step: budget, fairness, waiting bound, room, cancellation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from nvembed.serving.batching import Job, Scheduler


def scheduler(batch_tokens: int = 10, max_wait: float = 1.0, queue: int = 10_000) -> Scheduler:
    return Scheduler(batch_tokens=batch_tokens, max_wait=max_wait, queue_tokens=queue)


def add(queue: Scheduler, client: str, lengths: Sequence[int], now: float = 0.0) -> Job:
    job = Job(client, lengths)
    assert queue.add(job, now)
    return job


def drain(queue: Scheduler) -> list[list[tuple[Job, int]]]:
    batches = []
    while batch := queue.take():
        batches.append(batch)
    return batches


def test_a_batch_keeps_to_the_budget_and_a_longer_text_goes_alone() -> None:
    queue = scheduler(batch_tokens=10)
    job = add(queue, "a", [4, 4, 4, 25, 1])
    assert drain(queue) == [[(job, 0), (job, 1)], [(job, 2)], [(job, 3)], [(job, 4)]]
    assert (queue.waiting_tokens, queue.waiting_jobs) == (0, 0)
    assert queue.take() == []


def test_within_a_client_first_come_first_served() -> None:
    queue = scheduler(batch_tokens=2)
    first, second = add(queue, "a", [1, 1, 1]), add(queue, "a", [1])
    slots = [slot for batch in drain(queue) for slot in batch]
    assert slots == [(first, 0), (first, 1), (first, 2), (second, 0)]


def test_a_large_request_does_not_delay_a_small_one() -> None:
    queue = scheduler(batch_tokens=10)
    add(queue, "bulk", [5] * 100)
    queue.take()
    small = add(queue, "small", [5])
    assert (small, 0) in queue.take() + queue.take()
    # The same with one queue for all: 49 batches of the other client come first.
    single = scheduler(batch_tokens=10)
    add(single, "all", [5] * 100)
    single.take()
    late = add(single, "all", [5])
    assert [(late, 0) in batch for batch in drain(single)].index(True) == 49


def test_tokens_are_shared_evenly_between_clients() -> None:
    queue = scheduler(batch_tokens=50)
    short, long = add(queue, "short", [1] * 1000), add(queue, "long", [20] * 50)
    served: Counter[Job] = Counter()
    for _ in range(10):
        for job, row in queue.take():
            served[job] += job.lengths[row]
    assert abs(served[short] - served[long]) <= 20


def test_nobody_saves_up_turns_while_away() -> None:
    queue = scheduler(batch_tokens=10)
    back = add(queue, "back", [10])
    add(queue, "there", [10] * 40)
    for _ in range(30):
        queue.take()
    back = add(queue, "back", [10] * 30)
    served = Counter(queue.take()[0][0].client for _ in range(10))
    assert abs(served["back"] - served["there"]) <= 1
    assert back.next_row > 0


def test_waiting_bound() -> None:
    queue = scheduler(batch_tokens=10, max_wait=2.0)
    assert queue.ready_at(0.0) is None
    add(queue, "a", [3], now=1.0)
    add(queue, "b", [3], now=2.5)
    assert queue.ready_at(2.6) == 3.0  # the oldest came at 1.0
    assert queue.ready_at(7.0) == 7.0
    add(queue, "b", [4], now=2.7)
    assert queue.ready_at(2.7) == 2.7  # full


def test_room_is_bounded_but_an_empty_queue_takes_any() -> None:
    queue = scheduler(batch_tokens=10, queue=20)
    add(queue, "a", [30])
    assert not queue.add(Job("b", [1]), 0.0)
    queue.take()
    add(queue, "a", [15])
    assert not queue.has_room(6)
    assert queue.has_room(5)
    add(queue, "b", [5])
    assert queue.waiting_tokens == 20


def test_cancelled_texts_are_not_taken_and_free_their_room() -> None:
    queue = scheduler(batch_tokens=10, queue=30)
    gone, stays = add(queue, "a", [5] * 4), add(queue, "b", [5, 5])
    taken = queue.take()
    queue.cancel(gone)
    queue.cancel(gone)
    rest = [slot for batch in drain(queue) for slot in batch]
    assert {job for job, _ in rest} <= {stays}
    assert sorted(row for job, row in taken + rest if job is stays) == [0, 1]
    assert (queue.waiting_tokens, queue.waiting_jobs) == (0, 0)
    again = add(queue, "a", [5])
    assert drain(queue) == [[(again, 0)]]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.lists(st.integers(1, 30), min_size=1, max_size=6)),
        max_size=12,
    ),
    st.sets(st.integers(0, 11)),
    st.integers(1, 40),
)
def test_every_text_exactly_once(jobs, cancelled, budget) -> None:
    queue = scheduler(batch_tokens=budget, queue=10**9)
    added = [add(queue, client, lengths) for client, lengths in jobs]
    for number in cancelled & set(range(len(added))):
        queue.cancel(added[number])
    batches = drain(queue)
    for batch in batches:
        tokens = sum(job.lengths[row] for job, row in batch)
        assert tokens <= budget or len(batch) == 1
    taken = Counter(slot for batch in batches for slot in batch)
    expected = [
        (job, row)
        for number, job in enumerate(added)
        if number not in cancelled
        for row in range(len(job.lengths))
    ]
    assert taken == Counter(expected)
    assert (queue.waiting_tokens, queue.waiting_jobs) == (0, 0)
