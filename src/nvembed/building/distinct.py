"""Each record once, each query once; in bounded memory.

    retrieval, nli    records with an equal query and instruction become one, at the place of the
                      first: positives and negatives of all, each once, in order; a negative that
                      is a positive of another record goes. Teacher's scores stay if every record
                      has them.
    sts               of records with the same two sentences, in either order, the first stays
    classification,   of records with the same text and label the first stays; a text may have
    clustering        several labels

Texts are equal when they differ in case and white space alone (``mining/pool.text_key``). Memory
holds 16 bytes per record: a digest of its key. Records that are to be merged are spilled to files
of bounded size.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nvembed.data.built_sets import Rows
from nvembed.data.records import Converted, PairRecord, Record, StsRecord, record_of
from nvembed.mining.corpus import text_key

# Records that share a query and are held in memory at once.
SPILL_RECORDS = 50_000
# ``text_key`` leaves no white space but single blanks, and this character counts as such.
_BETWEEN = "\x1f"


@dataclass
class Repeats:
    """What was found: records that brought nothing new, and records merged into another."""

    equal: int = 0
    merged: int = 0


class Digests:
    """128 bits of every key, 16 bytes each."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def add(self, *texts: str) -> None:
        """Note the next key, made of texts."""
        key = _BETWEEN.join(map(text_key, texts))
        self._bytes += hashlib.blake2b(key.encode(), digest_size=16).digest()

    def first_rows(self) -> NDArray[np.int64]:
        """For each key in order, the number of the first key that is equal to it."""
        words_N2 = np.frombuffer(self._bytes, dtype=np.uint64).reshape(-1, 2)
        order_N = np.lexsort((words_N2[:, 1], words_N2[:, 0]))  # stable: equal keys stay in order
        sorted_N2 = words_N2[order_N]
        is_new_N = np.ones(len(order_N), dtype=np.bool_)
        is_new_N[1:] = (sorted_N2[1:] != sorted_N2[:-1]).any(axis=1)
        first_N = np.empty(len(order_N), dtype=np.int64)
        first_N[order_N] = order_N[is_new_N][np.cumsum(is_new_N) - 1]
        return first_N


def identity(record: Record) -> tuple[str, ...]:
    """The texts of which no two records of a set may have the same."""
    if isinstance(record, PairRecord):
        return (record.query, record.instruction or "")
    if isinstance(record, StsRecord):
        return tuple(sorted((record.sentence1, record.sentence2), key=text_key))
    return record.text, record.label


def distinct(rows: Rows, scratch: Path, repeats: Repeats) -> Iterator[Converted]:
    """Yield the records without repetition, in the order of their first places.

    Args:
        rows: all records of a set.
        scratch: a folder that does not exist, for spilled records; it is deleted in the end.
        repeats: is counted up.
    """
    digests = Digests()
    is_pairs = False
    for row in rows():
        is_pairs = isinstance(row.record, PairRecord)
        digests.add(*identity(row.record))
    first_N = digests.first_rows()
    del digests
    if not is_pairs:
        for number, row in enumerate(rows()):
            if first_N[number] == number:
                yield row
            else:
                repeats.equal += 1
        return
    yield from _merged(rows, first_N, scratch, repeats)


def _merged(
    rows: Rows, first_N: NDArray[np.int64], scratch: Path, repeats: Repeats
) -> Iterator[Converted]:
    size_N = np.bincount(first_N, minlength=len(first_N))
    # Groups in the order of their first records, cut where a bucket is full.
    members_N = np.where(size_N > 1, size_N, 0)
    bucket_N = (np.cumsum(members_N) - members_N) // SPILL_RECORDS
    _spill(rows, first_N, size_N, bucket_N, scratch)
    bucket, groups = -1, dict[int, list[PairRecord]]()
    for number, row in enumerate(rows()):
        if first_N[number] != number:
            continue
        if size_N[number] == 1:
            yield row
            continue
        if bucket != bucket_N[number]:
            bucket = int(bucket_N[number])
            groups = _read_spilled(_bucket_file(scratch, bucket))
        yield Converted(merge(groups[number], repeats), row.place)
    shutil.rmtree(scratch, ignore_errors=True)


def _spill(
    rows: Rows,
    first_N: NDArray[np.int64],
    size_N: NDArray[np.int64],
    bucket_N: NDArray[np.int64],
    scratch: Path,
) -> None:
    """Write the records that share a query to the file of their bucket."""
    buckets = np.unique(bucket_N[size_N > 1]).tolist()
    if not buckets:
        return
    scratch.mkdir()
    files = {
        bucket: open(_bucket_file(scratch, bucket), "w", encoding="utf-8", newline="\n")
        for bucket in buckets
    }
    try:
        for number, row in enumerate(rows()):
            first = int(first_N[number])
            if size_N[first] > 1:
                line = json.dumps([first, row.record.to_json()], ensure_ascii=False)
                files[int(bucket_N[first])].write(line + "\n")
    finally:
        for file in files.values():
            file.close()


def _bucket_file(scratch: Path, bucket: int) -> Path:
    return scratch / f"{bucket}.jsonl"


def _read_spilled(path: Path) -> dict[int, list[PairRecord]]:
    groups: dict[int, list[PairRecord]] = {}
    with open(path, encoding="utf-8", newline="\n") as lines:
        for line in lines:
            first, row = json.loads(line)
            record = record_of(row, "retrieval")
            assert isinstance(record, PairRecord)
            groups.setdefault(first, []).append(record)
    return groups


def merge(records: Sequence[PairRecord], repeats: Repeats) -> PairRecord:
    """Make one record of several with the same query, in its first spelling."""
    scored = all(record.positive_scores for record in records)
    positives: dict[str, tuple[str, float]] = {}
    negatives: dict[str, tuple[str, float]] = {}
    for number, record in enumerate(records):
        before = len(positives), len(negatives)
        for found, texts, scores in (
            (positives, record.positives, record.positive_scores),
            (negatives, record.negatives, record.negative_scores),
        ):
            for text, score in zip(texts, scores if scored else (0.0,) * len(texts), strict=True):
                found.setdefault(text_key(text), (text, score))
        if number and before == (len(positives), len(negatives)):
            repeats.equal += 1
        elif number:
            repeats.merged += 1
    kept = [value for key, value in negatives.items() if key not in positives]
    return PairRecord(
        records[0].query,
        tuple(text for text, _ in positives.values()),
        tuple(text for text, _ in kept),
        tuple(score for _, score in positives.values()) if scored else (),
        tuple(score for _, score in kept) if scored else (),
        records[0].instruction,
    )
