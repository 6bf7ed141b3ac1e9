"""What the database costs besides the model: documents per second, query latency, recall, memory.

    python benchmarks/index_scale.py --documents 100000 --dimension 256

Vectors are made (clusters of equal size with noise), so the "model" takes next to no time: what is
timed is reading JSONL, looking ids up, writing, and building the indexes. Then the same queries are
put with the index and without; the recall@10 of the first is against the second, and the second is
checked against numpy. One process; peak memory is its largest resident size.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nvembed.index.build import IndexOptions, index_documents
from nvembed.index.database import Database
from nvembed.index.search import SearchOptions, find

WORDS = [chr(97 + i) * 2 + "en" for i in range(15)]


class Made:
    """Vectors by the number at the end of a text."""

    def __init__(self, count: int, dimension: int) -> None:
        choose = np.random.default_rng(0)
        self._centres = choose.normal(size=(max(10, count // 200), dimension)).astype(np.float32)
        self.dimension = dimension

    def encode_document(
        self, texts: Sequence[str], *, task: str | None = None
    ) -> NDArray[np.float32]:
        return np.stack([self._vector(text) for text in texts])

    encode_query = encode_document

    def _vector(self, text: str) -> NDArray[np.float32]:
        last = text.rsplit(" ", 1)[-1]
        number = int(last) if last.isdecimal() else sum(text.encode())
        noise = np.random.default_rng(number).normal(size=self.dimension)
        vector = self._centres[number % len(self._centres)] + 0.7 * noise
        return (vector / np.linalg.norm(vector)).astype(np.float32)


def write_documents(path: Path, count: int) -> None:
    choose = np.random.default_rng(0)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            text = " ".join([*choose.choice(WORDS, size=20), str(number)])
            row = {"id": f"d{number}", "text": text, "year": 1950 + number % 75}
            file.write(json.dumps(row) + "\n")


def asked(database: Database, queries: NDArray[np.float32], options: SearchOptions) -> list[list]:
    """Milliseconds and ids per query, after one that warms up."""
    find(database, "alpha", queries[0], options)
    answers = []
    for query in queries:
        started = time.perf_counter()
        hits = find(database, "alpha beta", query, options)
        answers.append([1000 * (time.perf_counter() - started), [hit.id for hit in hits]])
    return answers


def show(name: str, answers: list[list]) -> None:
    times = [milliseconds for milliseconds, _ in answers]
    print(f"{name:<28} p50 {np.median(times):7.1f} ms   p95 {np.percentile(times, 95):7.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--dimension", type=int, default=256)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp())
    documents, path = folder / "docs.jsonl", folder / "db"
    write_documents(documents, given.documents)
    encoder = Made(given.documents, given.dimension)

    started = time.perf_counter()
    every = encoder.encode_document([f"x {n}" for n in range(given.documents)])
    made = time.perf_counter() - started

    def index(name: str, ann_above: int) -> None:
        started = time.perf_counter()
        done = index_documents(
            path, [documents], model=encoder, options=IndexOptions(ann_above=ann_above)
        )
        seconds = time.perf_counter() - started - (made if done.embedded else 0.0)
        print(f"{name:<28} {seconds:7.1f} s   {given.documents / seconds:,.0f} documents/s")

    index("write, index ids and words", 10 * given.documents)
    index("again, nothing changed", 10 * given.documents)
    database = Database.open(path)
    started = time.perf_counter()
    database.tidy(ann_above=0)
    print(f"{'index vectors':<28} {time.perf_counter() - started:7.1f} s")

    choose = np.random.default_rng(1)
    queries = every[choose.integers(0, len(every), given.queries)] + choose.normal(
        scale=0.02, size=(given.queries, given.dimension)
    ).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    exact = asked(database, queries, SearchOptions(exact=True))
    near = asked(database, queries, SearchOptions())
    brute = [{f"d{n}" for n in np.argsort(-(every @ query))[:10]} for query in queries]
    assert all(len(set(ids) & best) >= 9 for (_, ids), best in zip(exact, brute, strict=True))
    show("exact", exact)
    show("approximate", near)
    show("approximate, year > 2000", asked(database, queries, SearchOptions(where="year > 2000")))
    show("approximate, hybrid", asked(database, queries, SearchOptions(hybrid=True)))
    shares = [len(set(a) & set(b)) / 10 for (_, a), (_, b) in zip(near, exact, strict=True)]
    print(f"recall@10 of approximate     {np.mean(shares):.3f}")
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"on disk {size / 2**20:,.0f} MB, vectors {every.nbytes / 2**20:,.0f} MB", end="; ")
    print(f"peak memory {peak:.2f} GB (the made vectors are held too)")


if __name__ == "__main__":
    main()
