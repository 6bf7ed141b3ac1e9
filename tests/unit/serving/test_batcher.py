"""The thread and the futures: results, faults, cancellation, back-pressure, closing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest

from nvembed.serving.batching import Batcher, Scheduler
from nvembed.serving.engines import EmbedOptions
from nvembed.serving.errors import RequestError
from nvembed.serving.telemetry import Metrics
from serving_fakes import HeldEngine


class Bench:
    def __init__(self, queue_tokens: int = 1000, batch_tokens: int = 8, forwards: int = 1) -> None:
        self.engine = HeldEngine(forwards)
        scheduler = Scheduler(batch_tokens=batch_tokens, max_wait=0, queue_tokens=queue_tokens)
        self.batcher = Batcher(self.engine, scheduler, Metrics())
        self.batcher.start()

    def items(self, *texts: str):
        return self.engine.prepare(texts, EmbedOptions())

    async def hold(self) -> asyncio.Task:
        """Stop the model inside a batch, so that what follows must queue."""
        self.engine.open.clear()
        self.engine.began.clear()
        first = asyncio.create_task(self.batcher.embed(self.items("held"), "x"))
        await asyncio.to_thread(self.engine.began.wait, 10)
        return first


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench(queue_tokens=10)
    yield made
    made.engine.open.set()
    made.batcher.close()


def test_vectors_come_back_to_their_requests(bench: Bench) -> None:
    async def main() -> None:
        requests = [[f"text {n} {m}" for m in range(n + 1)] for n in range(3)]
        jobs = [bench.batcher.embed(bench.items(*texts), n) for n, texts in enumerate(requests[:2])]
        results = await asyncio.gather(*jobs)
        for texts, vectors in zip(requests, results, strict=False):
            oracle = np.stack([bench.engine._inner.embed(bench.items(text))[0] for text in texts])
            np.testing.assert_array_equal(vectors, oracle)

    asyncio.run(main())


def test_queued_requests_share_a_batch(bench: Bench) -> None:
    async def main() -> None:
        first = await bench.hold()
        others = [asyncio.create_task(bench.batcher.embed(bench.items(t), t)) for t in "abc"]
        await asyncio.sleep(0)
        bench.engine.open.set()
        await asyncio.gather(first, *others)

    asyncio.run(main())
    assert bench.engine.batches == [["held"], ["a", "b", "c"]]


def test_a_full_queue_refuses_with_a_time_to_come_back(bench: Bench) -> None:
    async def main() -> None:
        first = await bench.hold()
        waiting = asyncio.create_task(bench.batcher.embed(bench.items("a b c d e f g h"), "y"))
        await asyncio.sleep(0)
        with pytest.raises(RequestError) as caught:
            await bench.batcher.embed(bench.items("one two three"), "z")
        assert caught.value.status == 429
        assert int(caught.value.headers()["retry-after"]) >= 1
        bench.engine.open.set()
        await asyncio.gather(first, waiting)  # what was accepted is answered

    asyncio.run(main())
    assert ["one two three"] not in bench.engine.batches


def test_a_cancelled_request_never_reaches_the_model(bench: Bench) -> None:
    async def main() -> None:
        first = await bench.hold()
        gone = asyncio.create_task(bench.batcher.embed(bench.items("gone"), "y"))
        stays = asyncio.create_task(bench.batcher.embed(bench.items("stays"), "z"))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        bench.engine.open.set()
        await asyncio.gather(first, stays)

    asyncio.run(main())
    assert bench.engine.batches == [["held"], ["stays"]]
    assert len(bench.batcher.scheduler.clients) == 0


@pytest.mark.parametrize("text", ["raise", "nan"])
def test_a_fault_hits_its_own_request_only(bench: Bench, text: str) -> None:
    async def main() -> None:
        first = await bench.hold()
        bad = asyncio.create_task(bench.batcher.embed(bench.items(text, "good text"), "y"))
        good = asyncio.create_task(bench.batcher.embed(bench.items("other"), "z"))
        await asyncio.sleep(0)
        bench.engine.open.set()
        await first
        with pytest.raises(RequestError) as caught:
            await bad
        assert caught.value.status == 503
        assert "secret" not in caught.value.message
        assert np.isfinite(await good).all()

    asyncio.run(main())


def test_forwards_run_side_by_side_and_share_a_request() -> None:
    bench = Bench(batch_tokens=2, forwards=2)
    texts = [f"text {row}" for row in range(9)]  # a batch each

    async def main() -> np.ndarray:
        bench.engine.open.clear()
        task = asyncio.create_task(bench.batcher.embed(bench.items(*texts), "x"))
        while len(bench.engine.batches) < 2:  # both wait inside the engine
            await asyncio.sleep(0.001)
        bench.engine.open.set()
        return await task

    vectors = asyncio.run(main())
    bench.batcher.close()
    np.testing.assert_array_equal(vectors, bench.engine._inner.embed(bench.items(*texts)))
    assert sorted(bench.engine.batches) == [[text] for text in texts]


@pytest.mark.parametrize("forwards", [1, 2])
def test_closing_finishes_what_was_accepted(forwards: int) -> None:
    bench = Bench(forwards=forwards)

    async def main() -> None:
        first = await bench.hold()
        tasks = [asyncio.create_task(bench.batcher.embed(bench.items(t), t)) for t in "abc"]
        await asyncio.sleep(0)
        closing = asyncio.create_task(asyncio.to_thread(bench.batcher.close))
        await asyncio.sleep(0.01)
        bench.engine.open.set()
        await asyncio.wait_for(asyncio.gather(first, *tasks, closing), 10)
        with pytest.raises(RequestError):
            await bench.batcher.embed(bench.items("late"), "z")

    asyncio.run(main())
    assert not bench.batcher.ready


def test_a_long_request_is_answered_beside_busy_connections() -> None:
    # Two connections of one text of 1,000 tokens each fill every batch, and come back at once.
    bench = Bench(queue_tokens=100_000, batch_tokens=1024)
    long = bench.items(*[f"text {row}" + " w" * 126 for row in range(100)])  # 12,800 tokens
    answers = {"a": 0, "b": 0}

    async def main() -> None:
        async def connection(client: str) -> None:
            while True:
                await bench.batcher.embed(bench.items("w " * 1000), client)
                answers[client] += 1
                assert answers[client] < 200, "the long request is starved"

        others = [asyncio.create_task(connection(client)) for client in answers]
        while not all(answers.values()):
            await asyncio.sleep(0.001)
        begun = sum(answers.values())
        request = asyncio.create_task(bench.batcher.embed(long, "long"))
        await asyncio.wait([request, *others], return_when=asyncio.FIRST_COMPLETED)
        for task in others:
            task.cancel()
        vectors = await request
        np.testing.assert_array_equal(vectors, bench.engine._inner.embed(long))
        assert sum(answers.values()) - begun <= 30  # two thirds of the tokens at most, 25.6 texts

    try:
        asyncio.run(main())
    finally:
        bench.batcher.close()
