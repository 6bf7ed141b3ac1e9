"""Checks a file of training data to its end: ``nvembed data check``.

Problems are bad rows, and good ones that contradict each other; warnings are what may be meant, and
seldom is. Memory holds 32 bytes per text of a record, and no texts but two of each class.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nvembed.building.row_filters import ClassSamples, Digests, identity
from nvembed.core.reporting import ProblemCounts
from nvembed.data.config import DatasetConfig
from nvembed.data.examples import POSITIVE_SCORE
from nvembed.data.loading import open_dataset
from nvembed.data.records import (
    MAX_SCORE,
    BadRow,
    Converted,
    LabelRecord,
    PairRecord,
    Record,
    StsRecord,
)
from nvembed.data.similarity import text_key


@dataclass
class Check:
    """What was found in a file: the number of good records, problems and warnings."""

    records: int = 0
    problems: ProblemCounts = field(default_factory=ProblemCounts)
    warnings: ProblemCounts = field(default_factory=ProblemCounts)


def check_file(config: DatasetConfig) -> Check:
    """Read a file to its end and look for problems in and between its records."""
    check, claims, classes = Check(), _Claims(), ClassSamples()
    highest = 0.0
    for row in _rows(config):
        if isinstance(row, BadRow):
            (check.warnings if row.harmless else check.problems).add(row.place, row.problem)
            continue
        record = row.record
        _check_record(row, check)
        claims.add(record, check.records)
        if isinstance(record, LabelRecord):
            classes.add(record, row)
        elif isinstance(record, StsRecord):
            highest = max(highest, record.score)
        check.records += 1
    for _, place, problem in classes.problems(config.conversion):
        check.problems.add(place, problem, by_value=True)
    if config.kind == "sts" and 0 < highest <= 1:
        check.warnings.add(
            str(config.path),
            f"no score is above {highest:g}, on a scale of 0 to {MAX_SCORE:g}; if it ends at 1, "
            "say `max_score: 1` in the recipe",
        )
    _tell_conflicts(config, claims.conflicts(), check)
    return check


def _rows(config: DatasetConfig) -> Iterator[Converted | BadRow]:
    return open_dataset(config, base_dir=Path(), give_up=False).rows


def _check_record(row: Converted, check: Check) -> None:
    """Look for problems within one record."""
    record, place = row.record, row.place
    problem, warn = check.problems.add, check.warnings.add
    if row.repeats:
        warn(place, "a text is given twice in one list")
    if isinstance(record, PairRecord):
        query = text_key(record.query)
        positives, negatives = _keys(record.positives), _keys(record.negatives)
        if positives & negatives:
            problem(place, "a positive is among the negatives too")
        if positives == {query}:
            problem(place, "the only positive is the query itself")
        elif query in positives:
            warn(place, "a positive is the query itself")
        if query in negatives:
            warn(place, "a negative is the query itself")
        if not row.repeats and (
            len(positives) < len(record.positives) or len(negatives) < len(record.negatives)
        ):
            warn(place, "two texts of one list differ in case and white space only")
    elif isinstance(record, StsRecord):
        sentences, negatives = _keys(identity(record)), _keys(record.negatives)
        if sentences & negatives and record.score >= POSITIVE_SCORE:
            problem(place, "a sentence is among the negatives too")
        if len(sentences) == 1 and record.score < POSITIVE_SCORE:
            warn(place, f"two equal sentences are scored {record.score:g}")


def _keys(texts: Iterable[str]) -> set[str]:
    return set(map(text_key, texts))


class _Claims:
    """Numbers that records say of a text or of a pair of texts, which others may contradict."""

    def __init__(self) -> None:
        self._keys, self._values, self._rows = Digests(), array("d"), array("q")
        self._labels: dict[str, int] = {}

    def add(self, record: Record, row: int) -> None:
        if isinstance(record, PairRecord):
            for relevant, texts in ((1.0, record.positives), (0.0, record.negatives)):
                for text in texts:
                    self._add((record.query, text), relevant, row)
        elif isinstance(record, StsRecord):
            self._add(identity(record), record.score, row)
        elif isinstance(record, LabelRecord):
            number = self._labels.setdefault(record.label, len(self._labels))
            self._add((record.text,), number, row)

    def _add(self, key: tuple[str, ...], value: float, row: int) -> None:
        self._keys.add(*key)
        self._values.append(value)
        self._rows.append(row)

    def conflicts(self) -> list[tuple[int, int, float]]:
        """Find (row, first row that says anything of the same, what this one says otherwise)."""
        first_N = self._keys.first_rows()
        values_N, rows_N = np.asarray(self._values), np.asarray(self._rows)
        # A record that contradicts itself is told of where it is read.
        other_N = (values_N != values_N[first_N]) & (rows_N != rows_N[first_N])
        found = rows_N[other_N], rows_N[first_N[other_N]], values_N[other_N]
        return list(zip(*(values.tolist() for values in found), strict=True))


def _tell_conflicts(
    config: DatasetConfig, conflicts: list[tuple[int, int, float]], check: Check
) -> None:
    """Name the places of conflicts, for which the file is read once more."""
    if not conflicts:
        return
    wanted = {number for row, earlier, _ in conflicts for number in (row, earlier)}
    good = (row for row in _rows(config) if isinstance(row, Converted))
    places = {number: row.place for number, row in enumerate(good) if number in wanted}
    for number, before, value in conflicts:
        place, earlier = places[number], places[before]
        if config.kind == "sts":
            check.warnings.add(place, f"the pair has another score in {earlier}")
        elif config.kind in ("classification", "clustering"):
            check.warnings.add(place, f"the text has another label in {earlier}")
        else:
            here, there = ("positive", "negative") if value else ("negative", "positive")
            check.problems.add(
                place, f"a document is {here} here and {there} for the same query in {earlier}"
            )
