"""Records: what a row of training data holds, by the kind of its set, and how a row is checked.

``_KINDS`` says what columns each kind has. Other keys (ids, titles, sources) may be there and are
not read. Nothing is repaired: a bad row is refused with the reason.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError

from nvembed.core.errors import ConfigError
from nvembed.data.instructions import read_task

Kind = Literal["retrieval", "nli", "sts", "classification", "clustering", "text"]
Conversion = Literal["example", "label"]

MAX_SCORE = 5.0  # STS scores are on the SemEval scale, 0 (unrelated) to 5 (the same meaning)


class RowError(Exception):
    """What is wrong with one row; becomes part of a DataError."""


def known_task(task: str | None) -> str | None:
    """Replace the name of a task by its instruction, with errors as pydantic wants them."""
    try:
        return read_task(task)
    except ConfigError as error:
        raise ValueError(f"{error.message}; expected {error.expected}") from error


# A character that ``str.strip`` does not take away.
Text = Annotated[str, Field(strict=True, pattern=r"[^\s\x1c-\x1f]")]
_Texts = Annotated[
    tuple[Text, ...],
    BeforeValidator(lambda given: [given] if isinstance(given, str) else given),
    AfterValidator(lambda texts: tuple(dict.fromkeys(texts))),
]
_Scores = Annotated[
    tuple[Annotated[float, Field(strict=True, allow_inf_nan=False)], ...],
    BeforeValidator(lambda given: given if isinstance(given, list | tuple) else [given]),
]
_NULL_IS_NONE = BeforeValidator(lambda given: () if given is None else given)


class _Row:
    """A record, whose fields are columns of a file."""

    __slots__ = ()

    def to_json(self) -> dict[str, Any]:
        """Return the object that is read back to an equal record; what is empty is left out."""
        return _ADAPTERS[type(self)].dump_python(
            self, mode="json", by_alias=True, exclude_defaults=True, warnings=False
        )


@dataclass(frozen=True, slots=True)
class PairRecord(_Row):
    """A query with documents that answer it and, given or mined, documents that do not."""

    query: Text
    # Texts of one list are different. A teacher's scores are there for both lists or for none.
    positives: Annotated[_Texts, Field(alias="positive", min_length=1)]
    negatives: Annotated[_Texts, _NULL_IS_NONE, Field(alias="negative")] = ()
    positive_scores: Annotated[_Scores, _NULL_IS_NONE] = ()
    negative_scores: Annotated[_Scores, _NULL_IS_NONE] = ()
    # The task of this query alone, in place of the one of its set.
    instruction: Annotated[Text, AfterValidator(known_task)] | None = None


@dataclass(frozen=True, slots=True)
class StsRecord(_Row):
    """Two sentences, their similarity from 0 to 5, and mined negatives that serve both of them."""

    sentence1: Text
    sentence2: Text
    score: Annotated[float, Field(strict=True, ge=0, le=MAX_SCORE, allow_inf_nan=False)]
    negatives: Annotated[_Texts, _NULL_IS_NONE, Field(alias="negative")] = ()


@dataclass(frozen=True, slots=True)
class LabelRecord(_Row):
    """A text and its class. Integer labels of a file become their decimal text."""

    text: Text
    label: Annotated[
        Text, BeforeValidator(lambda given: str(given) if type(given) is int else given)
    ]


@dataclass(frozen=True, slots=True)
class TextRecord(_Row):
    """A text of which nothing is known; a teacher's vectors are all that it teaches."""

    text: Text


Record = PairRecord | StsRecord | LabelRecord | TextRecord


PAIR_KINDS = ("retrieval", "nli")
LABEL_KINDS = ("classification", "clustering")
# Kinds, their record, the columns that have to be there, and what a good row looks like.
_KINDS: tuple[tuple[tuple[str, ...], Any, tuple[str, ...], str], ...] = (
    (
        PAIR_KINDS,
        PairRecord,
        ("query", "positive"),
        '{"query": text, "positive": text or [texts], "negative": [texts], optional; '
        '"positive_scores" and "negative_scores": [numbers], optional; '
        '"instruction": text, optional}',
    ),
    (
        ("sts",),
        StsRecord,
        ("sentence1", "sentence2", "score"),
        '{"sentence1": text, "sentence2": text, "score": 0 to 5, "negative": [texts], optional}',
    ),
    (LABEL_KINDS, LabelRecord, ("text", "label"), '{"text": text, "label": text or integer}'),
    (("text",), TextRecord, ("text",), '{"text": text}'),
)
RECORD_TYPES = {kind: made for kinds, made, _, _ in _KINDS for kind in kinds}
REQUIRED = {kind: needed for kinds, _, needed, _ in _KINDS for kind in kinds}
EXPECTED = {kind: row for kinds, _, _, row in _KINDS for kind in kinds}
_COLUMNS = {"positives": "positive", "negatives": "negative"}  # others are called like their field
_FIELDS = {
    made: {one.name: _COLUMNS.get(one.name, one.name) for one in fields(made)}
    for _, made, _, _ in _KINDS
}
COLUMNS = {kind: tuple(_FIELDS[made].values()) for kind, made in RECORD_TYPES.items()}
_ADAPTERS = {made: TypeAdapter[Any](made) for made in _FIELDS}
_CHECKS = {kind: _ADAPTERS[made].validator for kind, made in RECORD_TYPES.items()}


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that gives no record, why, and its place: ``file.jsonl:17``, or ``org/name row 17``.

    A harmless one names what is not there, or has no text: the others are used without it.
    """

    place: str
    problem: str
    harmless: bool = False


class Converted(NamedTuple):
    """A record, the place of its (first) row, and how many texts its lists give a second time."""

    record: Record
    place: str
    repeats: int = 0


def texts_of(record: Record) -> tuple[str, ...]:
    """All texts of a record, negatives included."""
    if isinstance(record, PairRecord):
        return (record.query, *record.positives, *record.negatives)
    if isinstance(record, StsRecord):
        return (record.sentence1, record.sentence2, *record.negatives)
    return (record.text,)


def record_of(row: dict[str, Any], kind: Kind) -> Record:
    """Make the record of a row that ``to_json`` gave; it is trusted, not checked again."""
    made = RECORD_TYPES[kind]
    given = {name: row.get(column) for name, column in _FIELDS[made].items()}
    return made(
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in given.items()
            if value is not None
        }
    )


def records_digest(records: Sequence[Record]) -> str:
    """SHA-256 of records: the same from whatever file and layout they were read."""
    digest, encode = hashlib.sha256(), json.JSONEncoder(ensure_ascii=False).encode
    for record in records:
        digest.update((encode(record.to_json()) + "\n").encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def parse_record(row: dict[str, Any], kind: Kind) -> Record:
    """Check one row and make its record; a RowError says what is wrong."""
    try:
        record: Record = _CHECKS[kind].validate_python(row)
    except ValidationError as error:
        missing = [f'"{key}"' for key in REQUIRED[kind] if key not in row]
        told = f"missing {' and '.join(missing)}" if missing else _problem(error, row)
        raise RowError(told) from None
    if type(record) is PairRecord and ("positive_scores" in row or "negative_scores" in row):
        return _with_scores(record, row)
    return record


def parse_line(line: bytes, kind: Kind) -> Record | None:
    """The record of a line of JSON in half the time; None where ``parse_record`` has to see it."""
    try:
        return None if b"_scores" in line else _CHECKS[kind].validate_json(line)
    except ValidationError:
        return None


def _problem(error: ValidationError, row: dict[str, Any]) -> str:
    """Say the first problem that pydantic found in our words."""
    first = error.errors(include_url=False)[0]
    key, *index = map(str, first["loc"])
    kind, value = first["type"], first["input"]
    in_list = bool(index) and (key in _SCORES or isinstance(row[key], list))
    name = f'"{key}[{index[0]}]"' if in_list else f'"{key}"'
    if kind == "value_error":
        return f"{name}: {str(first['msg']).removeprefix('Value error, ')}"
    if kind == "string_unicode":  # JSON can spell half a surrogate pair; no tokenizer takes it
        return f"{name} holds half a character (a lone surrogate)"
    if kind == "string_pattern_mismatch":
        return f"{name} is empty, expected a text"
    if kind == "too_short":
        return f"{name} is an empty list, expected at least one text"
    expected = {"score": "a number from 0 to 5", "label": "a text or an integer"}.get(key, "a text")
    if kind == "tuple_type":
        expected = "a text or a list of texts"
    elif key in _SCORES and _is_unlisted(row, key):
        name, value, expected = f'"{key}"', row[key], "a list of numbers"
    elif key in _SCORES and type(value) in (int, float):
        value = value if isinstance(value, float) else math.inf  # too large for a float
        expected = "a finite number"
    elif key in _SCORES:
        expected = "a number"
    return f"{name} is {_shown(value)}, expected {expected}"


_SCORES = {"positive_scores": "positive", "negative_scores": "negative"}


def _is_unlisted(row: dict[str, Any], key: str) -> bool:
    """Scores of listed texts have to be listed too; that of a single text need not."""
    return not isinstance(row[key], list) and not isinstance(row.get(_SCORES[key]), str)


def _with_scores(record: PairRecord, row: dict[str, Any]) -> PairRecord:
    """The record with one score of each different text."""
    found: dict[str, Any] = {}
    for key, side in _SCORES.items():
        if row.get(key) is None:
            continue
        if _is_unlisted(row, key):
            raise RowError(f'"{key}" is {_shown(row[key])}, expected a list of numbers')
        texts, scores = row.get(side) or (), getattr(record, key)
        texts = [texts] if isinstance(texts, str) else texts
        if len(scores) != len(texts):
            raise RowError(f'"{key}" and "{side}" differ in length: {len(scores)}, {len(texts)}')
        score_of: dict[str, float] = {}
        for index, (text, score) in enumerate(zip(texts, scores, strict=True)):
            if score_of.setdefault(text, score) != score:
                raise RowError(f'"{key}[{index}]" is another score of the same text')
        found[key] = tuple(score_of.values())
    record = replace(record, **found)
    if record.negative_scores and not record.positive_scores:
        raise RowError('"negative_scores" is there and "positive_scores" is missing')
    if record.positive_scores and len(record.negative_scores) < len(record.negatives):
        raise RowError('"positive_scores" is there and "negative_scores" is missing')
    return record


def _shown(value: Any) -> str:
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a text"}
    if value is None:
        return "null"
    return names.get(type(value)) or str(value).lower()


LABEL_HINTS = {
    "example": "Add texts, drop the lines, or set conversion: label where labels are words",
    "label": "Use conversion: example, which needs no words for labels",
}


def label_problems(records: Sequence[LabelRecord], conversion: Conversion) -> list[tuple[int, str]]:
    """Find the classes that cannot be converted: (index of the first record, problem), in order.

    By example a class needs two different texts and a set two classes; label texts need to be words
    that differ from each other.
    """
    first: dict[str, int] = {}
    texts: dict[str, set[str]] = {}
    for index, record in enumerate(records):
        first.setdefault(record.label, index)
        texts.setdefault(record.label, set()).add(record.text)
    problems: list[tuple[int, str]] = []
    if len(first) == 1:
        told = f"{next(iter(first))!r} is the only label of the set, expected at least two"
        problems.append((0, told))
    spelled: dict[str, str] = {}
    for label, index in first.items():
        told, text = "", label_text(label)
        if conversion == "example":
            if len(texts[label]) == 1:
                told = f"label {label!r} has one text only, expected two different ones or more"
        elif not any(character.isalpha() for character in text):
            told = f"label {label!r} says nothing as a text, expected words"
        elif text in spelled:
            told = f"labels {spelled[text]!r} and {label!r} give the same text"
        spelled.setdefault(text, label)
        problems += [(index, told)] if told else []
    return problems


def label_text(label: str) -> str:
    """Spell a label as a text: underscores become spaces, all else stays as it is in the file."""
    return " ".join(label.replace("_", " ").split()) if "_" in label else label
