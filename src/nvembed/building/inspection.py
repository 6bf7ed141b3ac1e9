"""What a data set holds, in numbers and samples: ``nvembed data inspect``.

In: records and bad rows, one after the other; out: an ``Inspection``. Memory holds a few numbers
per record and no texts but the samples.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nvembed.building.distinct import Digests, identity
from nvembed.core.errors import ConfigError
from nvembed.core.reporting import ProblemCounts, progress
from nvembed.data.examples import POSITIVE_SCORE
from nvembed.data.records import BadRow, Converted, Kind, LabelRecord, PairRecord, Record, StsRecord

_PROBLEMS_SHOWN = 5
_CLASSES_SHOWN = 5
_BATCH = 256  # records that are tokenised at once


class CountTokens(Protocol):
    """Counts the tokens of texts."""

    def __call__(self, texts: Sequence[str]) -> list[int]:
        """One number per text, without special tokens."""
        ...


@dataclass(frozen=True, slots=True)
class Spread:
    """A distribution: how many values, and where they lie."""

    count: int
    mean: float
    min: int
    median: int
    p90: int
    p99: int
    max: int

    @classmethod
    def of(cls, values: Sequence[int]) -> Spread | None:
        """The spread of at least one value, else None. Percentiles are values that occur."""
        if not values:
            return None
        found = np.asarray(values, dtype=np.int64)
        low, middle, most, nearly_all, high = np.percentile(
            found, [0, 50, 90, 99, 100], method="inverted_cdf"
        ).tolist()
        return cls(len(found), float(found.mean()), low, middle, most, nearly_all, high)


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a set holds.

    Args:
        name: of the set.
        kind: of its records.
        records: their number.
        bad: rows that are no records.
        problems: the first kinds of those.
        repeated: records equal to an earlier one (pairs: with the query of an earlier one).
        characters: length of the texts of each side.
        tokens: the same in tokens; None without a tokenizer.
        per_record: number of positives and negatives of a record.
        without_negatives: records that have none; None for kinds that have no use for them.
        classes: number of classes; None where there are none, as of the next two.
        largest: the largest classes, name and size.
        smallest: the smallest ones.
        trained_on: STS pairs scored 4 or more; None for other kinds.
        samples: some records, as they would be written.
    """

    name: str
    kind: Kind
    records: int
    bad: int
    problems: tuple[str, ...]
    repeated: int
    characters: dict[str, Spread]
    tokens: dict[str, Spread] | None
    per_record: dict[str, Spread]
    without_negatives: int | None
    classes: int | None
    largest: tuple[tuple[str, int], ...] | None
    smallest: tuple[tuple[str, int], ...] | None
    trained_on: int | None
    samples: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """The inspection as plain data."""
        return asdict(self)


def load_token_counter(folder: Path) -> CountTokens:
    """Count with the tokenizer of a model folder.

    Raises:
        ConfigError: there is none in it.
    """
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(
            "no tokenizer here", where=str(folder), expected="a model folder with tokenizer.json"
        )
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def count(texts: Sequence[str]) -> list[int]:
        return [len(found) for found in tokenizer.encode_batch(texts, add_special_tokens=False)]

    return count


def inspect(
    name: str,
    kind: Kind,
    rows: Iterable[Converted | BadRow],
    *,
    num_samples: int,
    count_tokens: CountTokens | None = None,
) -> Inspection:
    """Look at all records of a set.

    Args:
        name: of the set.
        kind: of its records.
        rows: records and bad rows.
        num_samples: how many records to keep, drawn evenly with a fixed seed.
        count_tokens: None for lengths in characters alone.
    """
    tally = _Tally(num_samples, count_tokens)
    with progress(None, f"inspect {name}") as bar:
        for row in rows:
            tally.add(row)
            bar.advance()
    return tally.result(name, kind)


class _Tally:
    """Numbers so far."""

    def __init__(self, num_samples: int, count_tokens: CountTokens | None) -> None:
        self._num_samples = num_samples
        self._count_tokens = count_tokens
        self._choose = random.Random(0)
        self._samples: list[tuple[int, Record]] = []
        self._records = self._trained_on = self._without_negatives = 0
        self._problems = ProblemCounts()
        self._digests = Digests()
        self._characters: dict[str, array[int]] = {}
        self._tokens: dict[str, array[int]] = {}
        self._per_record: dict[str, array[int]] = {}
        self._classes: Counter[str] = Counter()
        self._waiting: list[tuple[str, str]] = []  # side and text, to be tokenised

    def add(self, row: Converted | BadRow) -> None:
        if isinstance(row, BadRow):
            self._problems.add(row.place, row.problem)
            return
        record = row.record
        self._records += 1
        self._draw(record)
        self._digests.add(*identity(record))
        for side, text in _sides(record):
            self._characters.setdefault(side, array("q")).append(len(text))
            if self._count_tokens is not None:
                self._waiting.append((side, text))
        if len(self._waiting) >= _BATCH:
            self._tokenise()
        if isinstance(record, LabelRecord):
            self._classes[record.label] += 1
            return
        self._per_record.setdefault("negatives", array("q")).append(len(record.negatives))
        self._without_negatives += not record.negatives
        if isinstance(record, PairRecord):
            self._per_record.setdefault("positives", array("q")).append(len(record.positives))
        else:
            self._trained_on += record.score >= POSITIVE_SCORE

    def _draw(self, record: Record) -> None:
        """Keep each record so far with the same chance."""
        if len(self._samples) < self._num_samples:
            self._samples.append((self._records, record))
        elif (place := self._choose.randrange(self._records)) < self._num_samples:
            self._samples[place] = (self._records, record)

    def _tokenise(self) -> None:
        if self._count_tokens is None or not self._waiting:
            return
        counts = self._count_tokens([text for _, text in self._waiting])
        for (side, _), count in zip(self._waiting, counts, strict=True):
            self._tokens.setdefault(side, array("q")).append(count)
        self._waiting = []

    def result(self, name: str, kind: Kind) -> Inspection:
        self._tokenise()
        has_classes = kind in ("classification", "clustering")
        ordered = sorted(self._classes.items(), key=lambda item: (-item[1], item[0]))
        firsts = self._digests.first_rows() if self._records else np.empty(0)
        return Inspection(
            name=name,
            kind=kind,
            records=self._records,
            bad=self._problems.count,
            problems=tuple(map(str, self._problems.kinds[:_PROBLEMS_SHOWN])),
            repeated=int((firsts != np.arange(len(firsts))).sum()),
            characters=_spreads(self._characters),
            tokens=None if self._count_tokens is None else _spreads(self._tokens),
            per_record=_spreads(self._per_record),
            without_negatives=None if has_classes else self._without_negatives,
            classes=len(ordered) if has_classes else None,
            largest=tuple(ordered[:_CLASSES_SHOWN]) if has_classes else None,
            smallest=tuple(ordered[: -_CLASSES_SHOWN - 1 : -1]) if has_classes else None,
            trained_on=self._trained_on if kind == "sts" else None,
            samples=tuple(record.to_json() for _, record in sorted(self._samples, key=_place)),
        )


def _place(sample: tuple[int, Record]) -> int:
    return sample[0]


def _spreads(values: dict[str, array[int]]) -> dict[str, Spread]:
    return {side: spread for side, found in values.items() if (spread := Spread.of(found))}


def _sides(record: Record) -> list[tuple[str, str]]:
    if isinstance(record, LabelRecord):
        return [("text", record.text)]
    if isinstance(record, StsRecord):
        sides = [("sentence", record.sentence1), ("sentence", record.sentence2)]
    else:
        sides = [("query", record.query), *(("positive", text) for text in record.positives)]
    return [*sides, *(("negative", text) for text in record.negatives)]
