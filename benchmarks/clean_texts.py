"""What cleaning costs and finds: evaluation texts in training texts, near-duplicates in a stream.

    python benchmarks/clean_texts.py ../shared/data --training 1000000 --tests 100000

First the training files of the folder against its tasks, as they are: what each rule finds. Then at
scale, with made texts: halves of two training queries put together, and as tests the tasks' texts
and pairs of training queries put together. Prints records per second on one core, and memory.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from pathlib import Path

import psutil

from nvembed.building.contamination import (
    Contamination,
    EvaluationText,
    NearDuplicates,
    evaluation_texts,
)
from nvembed.core.files import read_jsonl
from nvembed.data.loading import read_records
from nvembed.data.records import Kind, LabelRecord, PairRecord, Record
from nvembed.evaluation.tasks import load_tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with train/ and tasks/")
    parser.add_argument("--training", type=int, default=1_000_000)
    parser.add_argument("--tests", type=int, default=100_000)
    options = parser.parse_args()
    items = list(evaluation_texts(load_tasks([options.data / "tasks"])))
    records = {path: read(path) for path in sorted((options.data / "train").glob("*.jsonl.gz"))}
    real_files(items, records)
    queries = [text_of(record) for some in records.values() for record in some]
    at_scale(items, queries, options.training, options.tests)


def real_files(items: list[EvaluationText], records: dict[Path, list[Record]]) -> None:
    contamination = Contamination(items)
    total = dropped = 0
    started = time.perf_counter()
    for path, some in records.items():
        found = Counter(
            (match.found.task, match.rule)
            for record in some
            if (match := contamination.check_record(record))
        )
        total, dropped = total + len(some), dropped + found.total()
        shown = ", ".join(f"{task} {rule} {n}" for (task, rule), n in found.most_common(3))
        print(f"{path.name:32} {len(some):7,} records {found.total():6,} found  {shown}")
    seconds = time.perf_counter() - started
    print(f"{dropped:,} of {total:,} against {len(contamination):,} texts and pairs", end="; ")
    print(f"{total / seconds:,.0f} records/s")


def at_scale(
    items: list[EvaluationText], queries: list[str], num_training: int, num_tests: int
) -> None:
    rng = random.Random(0)
    made = (f"{rng.choice(queries)} {rng.choice(queries)}" for _ in range(num_tests))
    items = [*items, *(EvaluationText((text,), "made") for text in made)][:num_tests]
    texts = []
    for _ in range(num_training):
        first, second = rng.choice(queries).split(), rng.choice(queries).split()
        texts.append(" ".join(first[: len(first) // 2] + second[len(second) // 2 :]))
    with measured("evaluation texts indexed", len(items)):
        contamination = Contamination(items)
    with measured("compared with them", len(texts)):
        found = sum(contamination.check(text) is not None for text in texts)
    print(f"    {found:,} found")
    del contamination
    seen = NearDuplicates()
    with measured("near-duplicates sought", len(texts)):
        found = sum(bool(seen.find_or_add(key, text)) for key, text in enumerate(texts))
    print(f"    {found:,} found")


class measured:  # noqa: N801 - reads as a word
    def __init__(self, what: str, count: int) -> None:
        self._what, self._count = what, count

    def __enter__(self) -> None:
        self._memory = psutil.Process().memory_info().rss
        self._started = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        seconds = time.perf_counter() - self._started
        memory = (psutil.Process().memory_info().rss - self._memory) / 1e6
        print(f"{self._what}: {self._count:,} in {seconds:.1f} s,", end=" ")
        print(f"{self._count / seconds:,.0f}/s, {memory:+,.0f} MB", flush=True)


def read(path: Path) -> list[Record]:
    row = next(read_jsonl(path))[1]
    kind: Kind = "classification"
    if "query" in row or "sentence1" in row:
        kind = "retrieval" if "query" in row else "sts"
    conversion = "label" if path.name.startswith("atis") else "example"
    return list(read_records(path, kind, conversion=conversion))


def text_of(record: Record) -> str:
    if isinstance(record, PairRecord):
        return record.query
    return record.text if isinstance(record, LabelRecord) else record.sentence1


if __name__ == "__main__":
    main()
