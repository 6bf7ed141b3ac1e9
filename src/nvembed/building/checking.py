"""Checks a file of training data to its end: bad rows, and good ones that contradict each other.

In: how to read a file. Out: a ``Check``: problems, with which the set cannot be trained on or would
teach the opposite of what it says elsewhere, and warnings. Memory holds 24 bytes per text of a
record, and no texts.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nvembed.core.reporting import ProblemCounts
from nvembed.data.config import DatasetConfig
from nvembed.data.examples import POSITIVE_SCORE
from nvembed.data.records import (
    MAX_SCORE,
    BadRow,
    Converted,
    LabelRecord,
    PairRecord,
    Record,
    StsRecord,
    label_problems,
)
from nvembed.data.sources.opening import open_dataset
from nvembed.mining.corpus import text_key


@dataclass
class Check:
    """What was found in a file.

    Attributes:
        records: number of good records.
        problems: what has to be mended.
        warnings: what may be meant, and seldom is.
    """

    records: int = 0
    problems: ProblemCounts = field(default_factory=ProblemCounts)
    warnings: ProblemCounts = field(default_factory=ProblemCounts)


def check_file(config: DatasetConfig) -> Check:
    """Read a file to its end and look for problems in and between its records.

    Texts are equal where they differ in case and white space only.

    Args:
        config: how to read it; ``path`` starts at the working folder.

    Raises:
        SourceError: the file cannot be read, or not to its end.
    """
    check, claims, classes = Check(), _Claims(), _Classes()
    highest = 0.0
    for row in _rows(config):
        if isinstance(row, BadRow):
            (check.warnings if row.harmless else check.problems).add(row.place, row.problem)
            continue
        _check_record(row, check)
        for key, value in _claims_of(row.record):
            claims.add(key, value, check.records)
        if isinstance(row.record, LabelRecord):
            classes.add(row.record, row.place)
        elif isinstance(row.record, StsRecord):
            highest = max(highest, row.record.score)
        check.records += 1
    for place, problem in classes.problems(config):
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


# --- One record -----------------------------------------------------------------------------------


def _check_record(row: Converted, check: Check) -> None:
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
        sentences, negatives = _keys((record.sentence1, record.sentence2)), _keys(record.negatives)
        if sentences & negatives and record.score >= POSITIVE_SCORE:
            problem(place, "a sentence is among the negatives too")
        if len(sentences) == 1 and record.score < POSITIVE_SCORE:
            warn(place, f"two equal sentences are scored {record.score:g}")


def _keys(texts: tuple[str, ...]) -> set[str]:
    return set(map(text_key, texts))


# --- Between records ------------------------------------------------------------------------------


def _claims_of(record: Record) -> Iterator[tuple[str, float]]:
    """What a record says: of a pair of texts or of a text a number, which others may contradict."""
    if isinstance(record, PairRecord):
        query = text_key(record.query)
        for relevant, texts in ((1.0, record.positives), (0.0, record.negatives)):
            for text in texts:
                yield f"{query}\0{text_key(text)}", relevant
    elif isinstance(record, StsRecord):
        both = sorted((text_key(record.sentence1), text_key(record.sentence2)))
        yield "\0".join(both), record.score
    else:
        # 52 bits, so that a float holds them.
        yield text_key(record.text), float(_hash(record.label) >> 12)


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest())


@dataclass(frozen=True)
class _Conflict:
    """Two records (their numbers) that say different numbers of one thing."""

    row: int
    earlier: int
    value: float


class _Claims:
    """Numbers by key, as hashes of 64 bits."""

    def __init__(self) -> None:
        self._keys, self._values, self._rows = array("Q"), array("d"), array("q")

    def add(self, key: str, value: float, row: int) -> None:
        self._keys.append(_hash(key))
        self._values.append(value)
        self._rows.append(row)

    def conflicts(self) -> list[_Conflict]:
        """Find what is said otherwise than in the first record that says anything of it."""
        if not self._keys:
            return []
        keys_N = np.frombuffer(self._keys, dtype=np.uint64)
        values_N = np.frombuffer(self._values, dtype=np.float64)
        rows_N = np.frombuffer(self._rows, dtype=np.int64)
        _, first_K, key_N = np.unique(keys_N, return_index=True, return_inverse=True)
        first_N = first_K[key_N]
        # Of one record that contradicts itself is told where it is read.
        other_N = (values_N != values_N[first_N]) & (rows_N != rows_N[first_N])
        found = zip(
            rows_N[other_N].tolist(),
            rows_N[first_N[other_N]].tolist(),
            values_N[other_N].tolist(),
            strict=True,
        )
        return [_Conflict(*one) for one in found]


def _tell_conflicts(config: DatasetConfig, conflicts: list[_Conflict], check: Check) -> None:
    """Name the places of conflicts, for which the file is read once more."""
    if not conflicts:
        return
    wanted = {number for one in conflicts for number in (one.row, one.earlier)}
    good = (row for row in _rows(config) if isinstance(row, Converted))
    places = {number: row.place for number, row in enumerate(good) if number in wanted}
    for one in conflicts:
        place, earlier = places[one.row], places[one.earlier]
        if config.kind == "sts":
            check.warnings.add(place, f"the pair has another score in {earlier}")
        elif config.kind in ("classification", "clustering"):
            check.warnings.add(place, f"the text has another label in {earlier}")
        else:
            here, there = ("positive", "negative") if one.value else ("negative", "positive")
            check.problems.add(
                place, f"a document is {here} here and {there} for the same query in {earlier}"
            )


# --- Classes --------------------------------------------------------------------------------------


class _Classes:
    """Up to two different texts of each class, which is enough to tell what cannot be converted."""

    def __init__(self) -> None:
        self._samples: dict[str, list[LabelRecord]] = {}
        self._places: dict[str, str] = {}

    def add(self, record: LabelRecord, place: str) -> None:
        samples = self._samples.setdefault(record.label, [])
        self._places.setdefault(record.label, place)
        if len(samples) < 2 and all(sample.text != record.text for sample in samples):
            samples.append(record)

    def problems(self, config: DatasetConfig) -> Iterator[tuple[str, str]]:
        """(place, problem) of each class that cannot be converted."""
        found = [record for samples in self._samples.values() for record in samples]
        for index, problem in label_problems(found, config.conversion) if found else ():
            yield self._places[found[index].label], problem
