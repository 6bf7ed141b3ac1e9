"""Records: training data as it lies in a file, checked line by line.

A file of one of five kinds enters (JSONL, JSONL.gz or Parquet), a list of records leaves:

    retrieval, nli         {"query": str, "positive": str | [str], "negative": [str]?}
    sts                    {"sentence1": str, "sentence2": str, "score": 0 to 5, "negative": [str]?}
    classification,        {"text": str, "label": str | int}
    clustering

Other keys (ids, titles, sources) may be there and are not read. Nothing is repaired: a file with
bad lines is refused with the place and the reason. Next file: ``data/convert.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, overload

from nvembed.core.errors import DataError
from nvembed.core.files import read_jsonl

Kind = Literal["retrieval", "nli", "sts", "classification", "clustering"]
Conversion = Literal["example", "label"]

MAX_SCORE = 5.0  # STS scores are on the SemEval scale, 0 (unrelated) to 5 (the same meaning)
MAX_PROBLEMS_SHOWN = 5


@dataclass(frozen=True, slots=True)
class PairRecord:
    """A query with documents that answer it and, where given or mined, documents that do not."""

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the object that ``read_records`` reads back to an equal record."""
        row: dict[str, Any] = {"query": self.query, "positive": list(self.positives)}
        if self.negatives:
            row["negative"] = list(self.negatives)
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
    problems: list[tuple[int, str]] = []
    stopped: DataError | None = None
    try:
        for line, row in _rows(Path(path)):
            try:
                records.append(_parse(row, kind))
                lines.append(line)
            except _LineError as bad:
                problems.append((line, str(bad)))
    except DataError as error:
        if not problems:
            raise
        stopped = error  # the lines before it were bad as well: report both
    if not problems and not records:
        raise DataError("the file holds no records", where=str(path), expected=_EXPECTED[kind])
    if problems:
        _refuse(path, problems, stopped, expected=_EXPECTED[kind])
    if kind in ("classification", "clustering"):
        found = label_problems(records, conversion)
        if found:
            hint = LABEL_HINTS[conversion]
            _refuse(path, [(lines[index], text) for index, text in found], None, hint=hint)
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

_EXPECTED: dict[Kind, str] = {
    "retrieval": '{"query": text, "positive": text or [texts], "negative": [texts], optional}',
    "nli": '{"query": text, "positive": text or [texts], "negative": [texts], optional}',
    "sts": '{"sentence1": text, "sentence2": text, "score": 0 to 5, "negative": [texts], optional}',
    "classification": '{"text": text, "label": text or integer}',
    "clustering": '{"text": text, "label": text or integer}',
}
_REQUIRED: dict[Kind, tuple[str, ...]] = {
    "retrieval": ("query", "positive"),
    "nli": ("query", "positive"),
    "sts": ("sentence1", "sentence2", "score"),
    "classification": ("text", "label"),
    "clustering": ("text", "label"),
}


class _LineError(Exception):
    """What is wrong with one line; becomes part of a DataError."""


def _parse(row: dict[str, Any], kind: Kind) -> Record:
    missing = [key for key in _REQUIRED[kind] if key not in row]
    if missing:
        raise _LineError("missing " + " and ".join(f'"{key}"' for key in missing))
    match kind:
        case "retrieval" | "nli":
            return PairRecord(
                _text(row["query"], "query"),
                _texts(row["positive"], "positive", at_least_one=True),
                _negatives(row),
            )
        case "sts":
            return StsRecord(
                _text(row["sentence1"], "sentence1"),
                _text(row["sentence2"], "sentence2"),
                _score(row["score"]),
                _negatives(row),
            )
        case "classification" | "clustering":
            return LabelRecord(_text(row["text"], "text"), _label(row["label"]))


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise _LineError(f'"{key}" is {_shown(value)}, expected a text')
    if not value.strip():
        raise _LineError(f'"{key}" is empty, expected a text')
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            # JSON can spell half a surrogate pair; no tokenizer takes it.
            raise _LineError(f'"{key}" holds half a character (a lone surrogate)') from None
    return value


def _texts(value: Any, key: str, *, at_least_one: bool) -> tuple[str, ...]:
    if isinstance(value, str):
        return (_text(value, key),)
    if not isinstance(value, list):
        raise _LineError(f'"{key}" is {_shown(value)}, expected a text or a list of texts')
    if at_least_one and not value:
        raise _LineError(f'"{key}" is an empty list, expected at least one text')
    texts = [_text(item, f"{key}[{index}]") for index, item in enumerate(value)]
    return tuple(dict.fromkeys(texts))


def _negatives(row: dict[str, Any]) -> tuple[str, ...]:
    value = row.get("negative")
    return () if value is None else _texts(value, "negative", at_least_one=False)


def _score(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _LineError(f'"score" is {_shown(value)}, expected a number from 0 to 5')
    if not 0.0 <= value <= MAX_SCORE:  # NaN compares false as well
        raise _LineError(f'"score" is {value}, expected a number from 0 to 5')
    return float(value)


def _label(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise _LineError(f'"label" is {_shown(value)}, expected a text or an integer')
    return _text(value, "label")


def _shown(value: Any) -> str:
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a text"}
    if value is None:
        return "null"
    return names.get(type(value)) or str(value).lower()


# --- The file -------------------------------------------------------------------------------------


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    return _parquet_rows(path) if path.suffix == ".parquet" else read_jsonl(path)


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if not path.is_file():
        raise DataError("no such file", where=str(path), expected="a Parquet file")
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            "reading Parquet needs pyarrow",
            where=str(path),
            hint="Run `pip install pyarrow`, or convert the file to JSONL",
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"not a readable Parquet file ({reason})", where=str(path)) from error


def _refuse(
    path: str | Path,
    problems: list[tuple[int, str]],
    stopped: DataError | None,
    *,
    expected: str | None = None,
    hint: str | None = None,
) -> NoReturn:
    """Raise one error for all bad lines of a file."""
    first, *others = problems[:MAX_PROBLEMS_SHOWN]
    message = first[1] + "".join(f"; line {line}: {text}" for line, text in others)
    beyond = len(problems) - MAX_PROBLEMS_SHOWN
    if beyond > 0:
        message += f"; and {beyond} more bad line{'s' if beyond > 1 else ''}"
    if stopped is not None:
        message += f"; then reading stopped ({stopped})"
    raise DataError(message, where=f"{path}:{first[0]}", expected=expected, hint=hint)
