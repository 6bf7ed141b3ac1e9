"""The first and the last sieve of a set: rows that are no records, records of no use.

In: rows of a source, or records; out: those that stay. What goes is written down, row by row, with
its place and the problem.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from nvembed.data.built_sets import Rows
from nvembed.data.config import DatasetConfig
from nvembed.data.records import (
    BadRow,
    Conversion,
    Converted,
    LabelRecord,
    PairRecord,
    Record,
    label_problems,
)
from nvembed.mining.corpus import text_key


class Notes:
    """A JSONL file, one object per thing that was left out; goes on with one that is there."""

    def __init__(self, path: Path) -> None:
        self.count = 0
        self.first: dict[str, Any] | None = None
        self._out: TextIO = open(path, "a", encoding="utf-8", newline="\n")

    def __enter__(self) -> Notes:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._out.close()

    def add(self, **note: Any) -> None:
        """Write one down."""
        self._out.write(json.dumps(note, ensure_ascii=False) + "\n")
        self.count += 1
        self.first = self.first or note


def usable(
    rows: Iterable[Converted | BadRow], notes: Notes, *, base_dir: Path
) -> Iterator[Converted]:
    """Yield the records among the rows; places are given relative to ``base_dir``.

    Refused are bad rows, and queries with no positive but themselves. A positive that is its own
    query is left out where there are others.
    """
    root = f"{base_dir}/"
    for row in rows:
        place = row.place.removeprefix(root)  # the same on every machine
        if isinstance(row, BadRow):
            notes.add(place=place, problem=row.problem)
            continue
        record = _without_query(row.record)
        if record is None:
            notes.add(place=place, problem="the only positive is the query itself")
        else:
            yield Converted(record, place)


def _without_query(record: Record) -> Record | None:
    """Take the query out of its positives; None where nothing is left."""
    if not isinstance(record, PairRecord):
        return record
    query = text_key(record.query)
    kept = [place for place, text in enumerate(record.positives) if text_key(text) != query]
    if len(kept) == len(record.positives):
        return record
    if not kept:
        return None
    scored = bool(record.positive_scores)
    return replace(
        record,
        positives=tuple(record.positives[place] for place in kept),
        positive_scores=tuple(record.positive_scores[place] for place in kept if scored),
    )


def class_problems(rows: Rows, conversion: Conversion) -> dict[str, str]:
    """Find the classes that cannot be converted, and why; see ``records.label_problems``.

    No two of the records may have the same text and label.
    """
    sizes: Counter[str] = Counter()
    samples: list[LabelRecord] = []
    for row in rows():
        assert isinstance(row.record, LabelRecord)
        sizes[row.record.label] += 1
        if sizes[row.record.label] <= 2:  # two are enough to tell that a class has several
            samples.append(row.record)
    return {samples[index].label: text for index, text in label_problems(samples, conversion)}


def capped(rows: Rows, total: int, dataset: DatasetConfig) -> Iterator[Converted]:
    """Yield at most ``max_records`` records, spread evenly over the set.

    Of classes each gives its share, at least two texts (so that a few more may come). STS sets are
    left whole: there the number counts directions of pairs that score 4 or more, which training
    cuts itself.

    Args:
        rows: the records.
        total: their number.
        dataset: the set.
    """
    most = dataset.max_records
    if most is None or most >= total or dataset.kind == "sts":
        yield from rows()
        return
    sizes: Counter[str] = Counter(_group(row.record) for row in rows())
    shares = {
        group: min(size, max(2 if group else 1, round(size * most / total)))
        for group, size in sizes.items()
    }
    seen: Counter[str] = Counter()
    for row in rows():
        group = _group(row.record)
        size, share, number = sizes[group], shares[group], seen[group]
        seen[group] += 1
        # Row n of a group stays where n * share / size passes a whole number.
        if (number * share) % size < share:
            yield row


def _group(record: Record) -> str:
    """The class of a record; one for all where there are none."""
    return record.label if isinstance(record, LabelRecord) else ""
