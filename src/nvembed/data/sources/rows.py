"""Tables of rows with their places, values found by their columns, and texts by their ids."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from nvembed.core.errors import SourceError
from nvembed.data.config import Column
from nvembed.data.records import BadRow, Converted, RowError

T = TypeVar("T")
Values = dict[str, Any]


class Row(NamedTuple):
    """One row of a source: the values of its columns."""

    place: str
    values: Values


Rows = Iterator[Row | BadRow]


@dataclass(frozen=True, slots=True)
class Table:
    """An opened table, whose rows are read as they are asked for, once."""

    name: str  # for errors: the path, or the id on the hub with configuration and split
    rows: Rows
    columns: tuple[str, ...] | None = None  # None where every row has its own (JSON)
    textual: bool = False  # numbers have to be read from texts (CSV and TSV)
    revision: str | None = None  # commit on the hub
    schema: Any = None  # of Arrow, where it is Parquet


@dataclass(slots=True)
class OpenedDataset:
    """A data set whose source was found and has the expected form; ``rows`` are read once."""

    revision: str | None  # commit on the hub
    rows: Iterator[Converted | BadRow]
    rows_read: int = 0  # so far, those that give no record or part of one included


def each_row(
    rows: Rows, convert: Callable[[Values], Iterable[T]]
) -> Iterator[tuple[str, T] | BadRow]:
    """Yield (place, what ``convert`` makes of the row); a RowError makes it a bad row."""
    for row in rows:
        if isinstance(row, BadRow):
            yield row
            continue
        try:
            for value in convert(row.values):
                yield row.place, value
        except RowError as bad:
            yield BadRow(row.place, str(bad))


def all_rows(
    rows: Rows, convert: Callable[[Values], Iterable[T]]
) -> Generator[BadRow, None, list[tuple[str, T]]]:
    """Return what ``each_row`` gives, after its bad rows were yielded."""
    found: list[tuple[str, T]] = []
    for row in each_row(rows, convert):
        if isinstance(row, BadRow):
            yield row
        else:
            found.append(row)
    return found


def separated_otherwise(columns: Sequence[str]) -> str | None:
    """What to do with a file whose columns hold a sign that separates those of others."""
    signs = {";": "semicolons", ",": "commas", "\t": "tabs"}
    for sign, told in signs.items():
        if any(sign in column for column in columns):
            return f"If {told} separate them, save it with commas (.csv) or tabs (.tsv) alone"
    return None


# Columns that an id may have where nothing says which: BEIR, the usual one, Tevatron.
ID_NAMES = ("_id", "id", "docid")

MISSING = object()
# What stands for the values of a column while columns are looked for without rows.
_UNKNOWN = object()


class Columns:
    """Looks values up by the names of a layout, which are columns unless ``names`` says others."""

    def __init__(self, names: Mapping[str, Column]) -> None:
        self._names = names

    def names(self, name: str) -> bool:
        """Whether the recipe says where the value is found."""
        return name in self._names

    def taken(self, name: str) -> str:
        """The column that the value is the whole of; its own name where it is a part or a join."""
        column = self._names.get(name, name)
        return column if isinstance(column, str) else name

    def find(self, values: Values, name: str) -> Any:
        """The value, ``MISSING`` where the row has no such column."""
        column = self._names.get(name)
        return values.get(name, MISSING) if column is None else _value(values, column)

    def need(self, values: Values, name: str) -> Any:
        """The value; a RowError that names the columns of the row where it has no such column."""
        value = self.find(values, name)
        if value is MISSING:
            raise RowError(f"{self._no_column(name)}; found: {', '.join(values) or 'none'}")
        return value

    def check(self, table: Table, needed: tuple[str, ...]) -> None:
        """Raise a SourceError where columns are not there, if the table says which it has."""
        if table.columns is None:
            return
        stand_in = dict.fromkeys(table.columns, _UNKNOWN)
        asked = dict.fromkeys((*needed, *self._names))
        absent = [name for name in asked if self.find(stand_in, name) is MISSING]
        if absent:
            example = table.columns[0] if table.columns else "NAME"
            raise SourceError(
                " and ".join(map(self._no_column, absent)),
                where=table.name,
                expected=f"one of the columns found: {', '.join(table.columns)}",
                hint=separated_otherwise(table.columns)
                or "Say under `columns` what they are called there, as in "
                f"`columns: {{{absent[0]}: {example}}}` or --column {absent[0]}={example}",
            )

    def _no_column(self, name: str) -> str:
        column = self._names.get(name)
        if column is None:
            return f'no column "{name}"'
        shown = column if isinstance(column, str) else " + ".join(column)
        return f'no column "{shown}" for "{name}"'


def _value(values: Values, column: Column) -> Any:
    """A column; or a place in it: of objects the key, of lists the item, of texts the word."""
    if not isinstance(column, str):
        return _joined([_value(values, part) for part in column])
    if column in values:
        return values[column]
    root, *path = column.split(".")
    value = values.get(root, MISSING)
    for step in path:
        if value is _UNKNOWN:
            return value
        if isinstance(value, str):
            value = value.split()
        if isinstance(value, dict):
            value = value.get(step, MISSING)
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return MISSING
    return value


def _joined(parts: list[Any]) -> Any:
    for special in (MISSING, _UNKNOWN):
        if any(part is special for part in parts):
            return special
    texts = [part for part in parts if part is not None]
    if not all(isinstance(text, str) for text in texts):
        raise RowError("columns to be joined hold something else than texts")
    return " ".join(filter(None, map(str.strip, texts)))


def read_id(value: Any) -> str:
    """Read an id: a text, or a whole number as its digits (copies of a set mix 7, 7.0 and "7")."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise RowError(f"an id is {type(value).__name__}, expected a text or a number")
    if not (text := str(value).strip()):
        raise RowError("an id is empty, expected a text or a number")
    return text


def read_title(value: Any) -> str:
    """Read an id or title in one spelling: without HTML entities and with composed accents."""
    text = html.unescape(read_id(value))
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def _join_texts(parts: Sequence[Any]) -> str:
    """Join title and text by a space, as mteb does; parts may be null."""
    if not all(isinstance(part, str) for part in parts if part is not None):
        raise RowError('"text" is no text' if len(parts) == 1 else '"title" or "text" is no text')
    return " ".join(part or "" for part in parts).strip()


@dataclass(frozen=True, slots=True)
class Keyed:
    """A table of texts by their ids."""

    table: Table
    columns: Columns
    ids: tuple[str, ...] = ID_NAMES  # names of the id where ``columns`` does not say
    texts: tuple[str, ...] = ("title", "text")  # what is there of these, likewise
    spell: Callable[[Any], str] = read_title  # how an id is written to be looked up

    def check(self) -> None:
        """Look for the columns; see ``Columns.check``."""
        have = self.table.columns or ()
        needed = () if set(self.ids) & set(have) else ("id",)
        self.columns.check(self.table, needed if self.texts[-1] in have else (*needed, "text"))

    def id_of(self, values: Values) -> str:
        """The id of a row; a RowError where there is none."""
        value = self.columns.find(values, "id")
        if value is MISSING:
            value = next((values[name] for name in self.ids if name in values), MISSING)
        return self.spell(self.columns.need(values, "id") if value is MISSING else value)

    def text_of(self, values: Values) -> str:
        """The text, with the title before it where there is one; it may be empty."""
        if self.columns.names("text") or self.texts[-1] not in values:
            return _join_texts([self.columns.need(values, "text")])
        return _join_texts([values[name] for name in self.texts if name in values])

    def look_up(self, ids: Iterable[str]) -> Generator[BadRow, None, dict[str, str]]:
        """Read the table until all texts are found; return them by id, and yield bad rows."""
        wanted, found = set(ids), dict[str, str]()

        def read(values: Values) -> Iterator[tuple[str, str]]:
            key = self.id_of(values)
            if key in wanted and key not in found:
                yield key, self.text_of(values)

        for row in each_row(self.table.rows, read) if wanted else ():
            if isinstance(row, BadRow):
                yield row
                continue
            place, (key, text) = row
            if not text:
                yield BadRow(place, f"document {key!r} has no text", harmless=True)
                continue
            found[key] = text
            if len(found) == len(wanted):
                break
        return found
