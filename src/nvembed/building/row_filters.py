"""Which rows of a source stay in a set; memory does not grow with the texts."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvembed.data.built_sets import Rows
from nvembed.data.config import DatasetConfig
from nvembed.data.records import (
    BadRow,
    Conversion,
    Converted,
    LabelRecord,
    PairRecord,
    Record,
    StsRecord,
    label_problems,
    record_of,
)
from nvembed.data.similarity import text_key

# ``text_key`` leaves no white space but single blanks, and this character counts as such.
_BETWEEN = "\x1f"


class Notes:
    """A JSONL file, one object per thing that was left out; goes on with one that is there."""

    def __init__(self, path: Path) -> None:
        self.count = 0
        self.first: dict[str, Any] | None = None
        self._out = open(path, "a", encoding="utf-8", newline="\n")
        self.close = self._out.close

    def add(self, **note: Any) -> None:
        """Write one down."""
        self._out.write(json.dumps(note, ensure_ascii=False) + "\n")
        self.count += 1
        self.first = self.first or note


def usable(
    rows: Iterable[Converted | BadRow], notes: Notes, *, base_dir: Path
) -> Iterator[Converted]:
    """Yield the records among the rows, with places relative to ``base_dir``; the rest is noted."""
    root = f"{base_dir}/"
    for row in rows:
        place = row.place.removeprefix(root)  # the same on every machine
        if isinstance(row, BadRow):
            notes.add(place=place, problem=row.problem)
        elif (record := without_query(row.record)) is None:
            notes.add(place=place, problem="the only positive is the query itself")
        else:
            yield Converted(record, place)


def without_query(record: Record) -> Record | None:
    """Take the query out of its positives; None where nothing is left."""
    if not isinstance(record, PairRecord):
        return record
    query = text_key(record.query)
    kept = [place for place, text in enumerate(record.positives) if text_key(text) != query]
    if len(kept) == len(record.positives):
        return record
    if not kept:
        return None
    scored = kept if record.positive_scores else ()
    return replace(
        record,
        positives=tuple(record.positives[place] for place in kept),
        positive_scores=tuple(record.positive_scores[place] for place in scored),
    )


class ClassSamples:
    """Two different texts of each class, which tell what classes cannot be converted."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[str, Converted]] = {}

    def add(self, record: LabelRecord, row: Converted) -> None:
        """Take in a record, unless there are enough of its class."""
        of_class = self._rows.setdefault(record.label, {})
        if len(of_class) < 2:
            of_class.setdefault(record.text, row)

    def problems(self, conversion: Conversion) -> list[tuple[str, str, str]]:
        """Return (class, place of its first record, problem), which may be two of a class."""
        places = [(label, row.place) for label, of in self._rows.items() for row in of.values()]
        records = [LabelRecord(text, label) for label, of in self._rows.items() for text in of]
        found = label_problems(records, conversion) if records else []
        return [(*places[at], problem) for at, problem in found]


def capped(rows: Rows, total: int, dataset: DatasetConfig) -> Iterator[Converted]:
    """Yield at most ``max_records`` of ``total`` records, spread evenly over the set.

    Of classes each gives its share, at least two texts (so that a few more may come). STS sets are
    left whole: there the number counts directions of pairs that score 4 or more, which training
    cuts.
    """
    most = dataset.max_records
    if most is None or most >= total or dataset.kind == "sts":
        yield from rows()
        return
    # Groups are classes; one for all where there are none.
    sizes: Counter[str] = Counter(getattr(row.record, "label", "") for row in rows())
    shares = {
        group: min(size, max(2 if group else 1, round(size * most / total)))
        for group, size in sizes.items()
    }
    seen: Counter[str] = Counter()
    for row in rows():
        group = getattr(row.record, "label", "")
        size, share, number = sizes[group], shares[group], seen[group]
        seen[group] += 1
        # Row n of a group stays where n * share / size passes a whole number.
        if (number * share) % size < share:
            yield row


# --- Each record once, each query once ------------------------------------------------------------


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
        """Note the next key, made of texts without regard to case and white space."""
        key = _BETWEEN.join(map(text_key, texts))
        data = key.encode("utf-8", "surrogatepass")
        self._bytes += hashlib.blake2b(data, digest_size=16).digest()

    def first_rows(self) -> NDArray[np.int64]:
        """For each key in order, the number of the first key that is equal to it."""
        keys_N = np.frombuffer(self._bytes, dtype="S16")
        _, first_K, key_N = np.unique(keys_N, return_index=True, return_inverse=True)
        return first_K[key_N]


def identity(record: Record) -> tuple[str, ...]:
    """The texts of which no two records of a set may have the same."""
    if isinstance(record, PairRecord):
        return (record.query, record.instruction or "")
    if isinstance(record, StsRecord):
        return tuple(sorted((record.sentence1, record.sentence2), key=text_key))
    return (record.text, record.label) if isinstance(record, LabelRecord) else (record.text,)


def distinct(rows: Rows, scratch: Path, repeats: Repeats) -> Iterator[Converted]:
    """Yield the records without repetition, in the order of their first places.

    Pair records with an equal query and instruction become one, with the positives and negatives of
    all; teacher's scores stay if every record has them. Of others with the same ``identity`` the
    first stays. ``repeats`` is counted up. Memory holds numbers per record; those that are to be
    merged wait in the file ``scratch``, which is deleted in the end.
    """
    digests = Digests()
    is_pairs = False
    for row in rows():
        is_pairs = isinstance(row.record, PairRecord)
        digests.add(*identity(row.record))
    first_N = digests.first_rows()
    del digests
    size_N = np.bincount(first_N, minlength=len(first_N))
    order_N, start_N = np.argsort(first_N, kind="stable"), np.cumsum(size_N) - size_N
    place_N, end = np.zeros_like(first_N), 0
    with open(scratch, "w+b") as spilled:
        for number, row in enumerate(rows() if is_pairs and (size_N > 1).any() else ()):
            if size_N[first_N[number]] > 1:
                place_N[number] = end
                line = json.dumps(row.record.to_json(), ensure_ascii=False) + "\n"
                end += spilled.write(line.encode())

        def read(place: int) -> PairRecord:
            spilled.seek(place)
            record = record_of(json.loads(spilled.readline()), "retrieval")
            assert isinstance(record, PairRecord)
            return record

        for number, row in enumerate(rows()):
            if first_N[number] != number:
                repeats.equal += not is_pairs
            elif size_N[number] == 1 or not is_pairs:
                yield row
            else:
                group = order_N[start_N[number] :][: size_N[number]]
                yield Converted(merge([*map(read, place_N[group].tolist())], repeats), row.place)
    scratch.unlink()


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
