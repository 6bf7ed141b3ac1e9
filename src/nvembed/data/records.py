"""Records: training data as it lies in a file, checked line by line.

A file of one of five kinds enters (JSONL, JSONL.gz or Parquet), a list of records leaves:

    retrieval, nli         {"query": str, "positive": str | [str], "negative": [str]?,
                            "positive_scores": float | [float]?, "negative_scores": [float]?,
                            "instruction": str?}
    sts                    {"sentence1": str, "sentence2": str, "score": 0 to 5, "negative": [str]?}
    classification,        {"text": str, "label": str | int}
    clustering

Other keys (ids, titles, sources) may be there and are not read. Nothing is repaired: a file with
bad lines is refused with the place and the reason. Next file: ``data/convert.py``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

from nvembed.core.errors import ConfigError, DataError
from nvembed.core.reporting import ProblemCounts
from nvembed.data.record_files import read_rows, refuse_rows
from nvembed.text.instructions import read_task

Kind = Literal["retrieval", "nli", "sts", "classification", "clustering"]
Conversion = Literal["example", "label"]

MAX_SCORE = 5.0  # STS scores are on the SemEval scale, 0 (unrelated) to 5 (the same meaning)


@dataclass(frozen=True, slots=True)
class PairRecord:
    """A query with documents that answer it and, where given or mined, documents that do not.

    Args:
        query: the query text.
        positives: different documents that answer it, at least one.
        negatives: different documents that do not.
        positive_scores: what a teacher gives each positive for the query, on a scale of its own;
            empty where there is no teacher.
        negative_scores: the same of the negatives; there with ``positive_scores`` or not at all.
        instruction: task of this query alone, in place of the one of its set; None for that one.
    """

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...] = ()
    positive_scores: tuple[float, ...] = ()
    negative_scores: tuple[float, ...] = ()
    instruction: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the object that ``read_records`` reads back to an equal record."""
        row: dict[str, Any] = {"query": self.query, "positive": list(self.positives)}
        if self.negatives:
            row["negative"] = list(self.negatives)
        if self.positive_scores:
            row["positive_scores"] = list(self.positive_scores)
        if self.negative_scores:
            row["negative_scores"] = list(self.negative_scores)
        if self.instruction is not None:
            row["instruction"] = self.instruction
        return row


@dataclass(frozen=True, slots=True)
class StsRecord:
    """Two sentences, their similarity from 0 to 5, and mined negatives that serve both of them."""

    sentence1: str
    sentence2: str
    score: float
    negatives: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the object that ``read_records`` reads back to an equal record."""
        row: dict[str, Any] = {
            "sentence1": self.sentence1,
            "sentence2": self.sentence2,
            "score": self.score,
        }
        if self.negatives:
            row["negative"] = list(self.negatives)
        return row


@dataclass(frozen=True, slots=True)
class LabelRecord:
    """A text and its class. Integer labels of a file become their decimal text."""

    text: str
    label: str

    def to_json(self) -> dict[str, Any]:
        """Return the object that ``read_records`` reads back to an equal record."""
        return {"text": self.text, "label": self.label}


Record = PairRecord | StsRecord | LabelRecord
Records = list[PairRecord] | list[StsRecord] | list[LabelRecord]


def records_digest(records: Sequence[Record]) -> str:
    """SHA-256 of records: the same from whatever file and layout they were read."""
    digest = hashlib.sha256()
    for record in records:
        line = json.dumps(record.to_json(), ensure_ascii=False) + "\n"
        digest.update(line.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


@overload
def read_records(
    path: str | Path, kind: Literal["retrieval", "nli"], *, conversion: Conversion = ...
) -> list[PairRecord]: ...
@overload
def read_records(
    path: str | Path, kind: Literal["sts"], *, conversion: Conversion = ...
) -> list[StsRecord]: ...
@overload
def read_records(
    path: str | Path,
    kind: Literal["classification", "clustering"],
    *,
    conversion: Conversion = ...,
) -> list[LabelRecord]: ...
@overload
def read_records(path: str | Path, kind: Kind, *, conversion: Conversion = ...) -> Records: ...


def read_records(path: str | Path, kind: Kind, *, conversion: Conversion = "example") -> Any:
    """Read all records of a file, or say everything that is wrong with it.

    Args:
        path: ``.jsonl``, ``.jsonl.gz`` or ``.parquet`` (rows count as lines, from 1).
        kind: what the file holds; decides the keys that are expected.
        conversion: what classes will be turned into (see ``data/convert.py``). A class with a
            single text gives no positive by example, a class called "7" says nothing as a label
            text.

    Raises:
        DataError: the file is missing, unreadable or empty; or naming up to five bad lines (missing
            key, wrong type, empty text, score outside 0 to 5, class that cannot be converted) and
            the number of those beyond.
    """
    records: list[Any] = []
    lines: list[int] = []
    problems = ProblemCounts()
    stopped: DataError | None = None
    try:
        for line, row in read_rows(Path(path)):
            try:
                records.append(parse_record(row, kind))
                lines.append(line)
            except RowError as bad:
                problems.add(f"{path}:{line}", str(bad))
    except DataError as error:
        if not problems.count:
            raise
        stopped = error  # the lines before it were bad as well: report both
    if not problems.count and not records:
        raise DataError("the file holds no records", where=str(path), expected=EXPECTED[kind])
    if problems.count:
        refuse_rows(problems, stopped, expected=EXPECTED[kind])
    if kind in ("classification", "clustering"):
        found = label_problems(records, conversion)
        if found:
            named = ((f"{path}:{lines[index]}", text) for index, text in found)
            refuse_rows(ProblemCounts(named, by_value=True), hint=LABEL_HINTS[conversion])
    return records


LABEL_HINTS = {
    "example": "Add texts, drop the lines, or set conversion: label where labels are words",
    "label": "Use conversion: example, which needs no words for labels",
}


def label_problems(records: Sequence[LabelRecord], conversion: Conversion) -> list[tuple[int, str]]:
    """Find the classes that cannot be converted.

    Example-based conversion takes the positive from the same class and the negatives from others,
    so a class needs two different texts and a set two classes. Label-text conversion needs labels
    that are words and differ from each other.

    Returns:
        (index of the first record of the class, what is wrong), in file order.
    """
    first: dict[str, int] = {}
    texts: dict[str, set[str]] = {}
    for index, record in enumerate(records):
        first.setdefault(record.label, index)
        texts.setdefault(record.label, set()).add(record.text)
    problems: list[tuple[int, str]] = []
    if len(first) == 1:
        label = next(iter(first))
        problems.append((0, f"{label!r} is the only label of the set, expected at least two"))
    if conversion == "example":
        problems += [
            (index, f"label {label!r} has one text only, expected two different ones or more")
            for label, index in first.items()
            if len(texts[label]) == 1
        ]
        return problems
    spelled: dict[str, str] = {}
    for label, index in first.items():
        text = label_text(label)
        if not any(character.isalpha() for character in text):
            problems.append((index, f"label {label!r} says nothing as a text, expected words"))
        elif text in spelled:
            problems.append((index, f"labels {spelled[text]!r} and {label!r} give the same text"))
        spelled.setdefault(text, label)
    return problems


def label_text(label: str) -> str:
    """Spell a label as a text: underscores become spaces, all else stays as it is in the file."""
    return " ".join(label.replace("_", " ").split()) if "_" in label else label


# --- One line -------------------------------------------------------------------------------------

_EXPECTED_PAIR = (
    '{"query": text, "positive": text or [texts], "negative": [texts], optional; '
    '"positive_scores" and "negative_scores": [numbers], optional; "instruction": text, optional}'
)
EXPECTED: dict[Kind, str] = {
    "retrieval": _EXPECTED_PAIR,
    "nli": _EXPECTED_PAIR,
    "sts": '{"sentence1": text, "sentence2": text, "score": 0 to 5, "negative": [texts], optional}',
    "classification": '{"text": text, "label": text or integer}',
    "clustering": '{"text": text, "label": text or integer}',
}
REQUIRED: dict[Kind, tuple[str, ...]] = {
    "retrieval": ("query", "positive"),
    "nli": ("query", "positive"),
    "sts": ("sentence1", "sentence2", "score"),
    "classification": ("text", "label"),
    "clustering": ("text", "label"),
}


class RowError(Exception):
    """What is wrong with one row; becomes part of a DataError."""


def parse_record(row: dict[str, Any], kind: Kind) -> Record:
    """Check one row and make its record.

    Args:
        row: keys as at the top of this file; others are not read.
        kind: what it holds.

    Raises:
        RowError: what is wrong with it.
    """
    missing = [key for key in REQUIRED[kind] if key not in row]
    if missing:
        raise RowError("missing " + " and ".join(f'"{key}"' for key in missing))
    match kind:
        case "retrieval" | "nli":
            return _pair(row)
        case "sts":
            return StsRecord(
                _text(row["sentence1"], "sentence1"),
                _text(row["sentence2"], "sentence2"),
                _score(row["score"]),
                _negatives(row),
            )
        case "classification" | "clustering":
            return LabelRecord(_text(row["text"], "text"), _label(row["label"]))


def _pair(row: dict[str, Any]) -> PairRecord:
    record = PairRecord(
        _text(row["query"], "query"),
        _texts(row["positive"], "positive", at_least_one=True),
        _negatives(row),
        _teacher_scores(row, "positive"),
        _teacher_scores(row, "negative"),
        _instruction(row.get("instruction")),
    )
    if record.negative_scores and not record.positive_scores:
        raise RowError('"negative_scores" is there and "positive_scores" is missing')
    if record.positive_scores and len(record.negative_scores) < len(record.negatives):
        raise RowError('"positive_scores" is there and "negative_scores" is missing')
    return record


def _instruction(value: Any) -> str | None:
    """Read a task's name or an instruction."""
    try:
        return None if value is None else read_task(_text(value, "instruction"))
    except ConfigError as error:
        raise RowError(f'"instruction": {error.message}; expected {error.expected}') from None


def _teacher_scores(row: dict[str, Any], side: str) -> tuple[float, ...]:
    """One score for each different text of ``row[side]``, which is known to be well formed."""
    key, texts, scores = f"{side}_scores", row.get(side), row.get(f"{side}_scores")
    if scores is None:
        return ()
    if isinstance(texts, str):
        texts = [texts]
        scores = scores if isinstance(scores, list) else [scores]
    if not isinstance(scores, list):
        raise RowError(f'"{key}" is {_shown(scores)}, expected a list of numbers')
    if len(scores) != len(texts or ()):
        raise RowError(f'"{key}" and "{side}" differ in length: {len(scores)}, {len(texts or ())}')
    score_of: dict[str, float] = {}
    for index, (text, value) in enumerate(zip(texts or (), scores, strict=True)):
        score = _finite(value, f"{key}[{index}]")
        if score_of.setdefault(text, score) != score:
            raise RowError(f'"{key}[{index}]" is another score of the same text')
    return tuple(score_of.values())


def _finite(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError(f'"{key}" is {_shown(value)}, expected a number')
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RowError(f'"{key}" is {number}, expected a finite number')
    return number


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise RowError(f'"{key}" is {_shown(value)}, expected a text')
    if not value.strip():
        raise RowError(f'"{key}" is empty, expected a text')
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            # JSON can spell half a surrogate pair; no tokenizer takes it.
            raise RowError(f'"{key}" holds half a character (a lone surrogate)') from None
    return value


def _texts(value: Any, key: str, *, at_least_one: bool) -> tuple[str, ...]:
    if isinstance(value, str):
        return (_text(value, key),)
    if not isinstance(value, list):
        raise RowError(f'"{key}" is {_shown(value)}, expected a text or a list of texts')
    if at_least_one and not value:
        raise RowError(f'"{key}" is an empty list, expected at least one text')
    texts = [_text(item, f"{key}[{index}]") for index, item in enumerate(value)]
    return tuple(dict.fromkeys(texts))


def _negatives(row: dict[str, Any]) -> tuple[str, ...]:
    value = row.get("negative")
    return () if value is None else _texts(value, "negative", at_least_one=False)


def _score(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError(f'"score" is {_shown(value)}, expected a number from 0 to 5')
    if not 0.0 <= value <= MAX_SCORE:  # NaN compares false as well
        raise RowError(f'"score" is {value}, expected a number from 0 to 5')
    return float(value)


def _label(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise RowError(f'"label" is {_shown(value)}, expected a text or an integer')
    return _text(value, "label")


def _shown(value: Any) -> str:
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a text"}
    if value is None:
        return "null"
    return names.get(type(value)) or str(value).lower()
