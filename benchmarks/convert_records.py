"""How fast rows become records, and in how much memory.

    python benchmarks/convert_records.py [--rows 1000000] [--folder /tmp/convert] [--files …]

Writes a file of made-up pairs in each format (about 250 characters a row) and reads it through
``open_dataset`` in a process of its own; prints records per second and the peak of memory (RSS on
Linux), and that of a file ten times smaller.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nvembed.data.config import DatasetConfig
from nvembed.data.loading import open_dataset
from nvembed.data.records import Converted

WORDS = ["lime", "mortar", "bridge", "fair", "river", "claim", "passage", "sleep", "fibre", "card"]
COLUMNS: dict[str, Any] = {"query": "question", "positive": "answer"}
# file name → keys of the data set
FORMATS: dict[str, dict[str, Any]] = {
    "plain.jsonl": {},
    "pairs.jsonl": {"columns": COLUMNS},
    "pairs.jsonl.gz": {"columns": COLUMNS},
    "pairs.csv": {"columns": COLUMNS},
    "pairs.parquet": {"columns": COLUMNS},
    "triplets.jsonl": {"layout": "tuples"},
}


def rows(count: int) -> Iterator[tuple[str, str]]:
    generator = random.Random(0)
    for number in range(count):
        yield (
            f"{number} " + " ".join(generator.choices(WORDS, k=8)),
            " ".join(generator.choices(WORDS, k=30)),
        )


def write(path: Path, count: int) -> None:
    names = ("query", "positive") if path.stem in ("plain", "triplets") else ("question", "answer")
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.Table.from_pylist([dict(zip(names, pair, strict=True)) for pair in rows(count)])
        pq.write_table(table, path, row_group_size=100_000)
        return
    opened: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.writer(file)
            writer.writerow(names)
            writer.writerows(rows(count))
            return
        for pair in rows(count):
            row = dict(zip(names, pair, strict=True))
            if path.stem == "triplets":
                row["negative_1"] = pair[1][::-1]
            file.write(json.dumps(row) + "\n")


def convert(path: Path, keys: dict[str, Any], result: Any) -> None:
    config = DatasetConfig.model_validate(
        {"name": "s", "path": str(path), "kind": "retrieval", "instruction": None} | keys
    )
    started = time.perf_counter()
    count = sum(isinstance(row, Converted) for row in open_dataset(config, base_dir=Path()).rows)
    seconds = time.perf_counter() - started
    # Not ``ru_maxrss``: that of a new process begins with what its parent held.
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
    result.send((count, seconds, peak))


def measure(path: Path, keys: dict[str, Any]) -> tuple[int, float, float]:
    # Spawned, because the peak of a forked process begins with its parent's.
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=convert, args=(path, keys, sender))
    process.start()
    measured: tuple[int, float, float] = receiver.recv()
    process.join()
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/convert"))
    parser.add_argument("--files", nargs="+", choices=FORMATS, default=list(FORMATS))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    print("| file | rows | records/s | peak MB | peak MB, a tenth of the rows |")
    print("|---|---|---|---|---|")
    for name in arguments.files:
        keys = FORMATS[name]
        path = arguments.folder / name
        write(path, arguments.rows // 10)
        small_peak = measure(path, keys)[2]
        write(path, arguments.rows)
        count, seconds, peak = measure(path, keys)
        assert count == arguments.rows
        path.unlink()
        print(f"| {name} | {count:,} | {count / seconds:,.0f} | {peak:.0f} | {small_peak:.0f} |")


if __name__ == "__main__":
    main()
