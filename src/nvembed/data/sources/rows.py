"""What sources are made of: rows with their places, and tables of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from nvembed.data.records import Record

Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source: the values of its columns."""

    place: str
    values: Values


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that gives no record, and why.

    Args:
        place: ``file.jsonl:17``, or ``organisation/name train row 17``.
        problem: what is wrong with it.
        harmless: the row is well formed and names what is not there, or has no text, as in many
            published sets: the others are used without it.
    """

    place: str
    problem: str
    harmless: bool = False


@dataclass(frozen=True, slots=True)
class Converted:
    """A record and the row that it comes from (the first one, where it comes from several).

    Args:
        record: checked.
        place: as of ``BadRow``.
        repeats: texts of the row that were given twice in one list, and are in the record once.
    """

    record: Record
    place: str
    repeats: int = 0


Rows = Iterator[Row | BadRow]


@dataclass(frozen=True, slots=True)
class Table:
    """An opened table.

    Args:
        name: for errors: the path, or the id on the hub with configuration and split.
        rows: read as they are asked for, once.
        columns: names of the columns; None where every row has its own (JSON).
        textual: all values are texts (CSV and TSV), so numbers have to be read from them.
        revision: commit on the hub; None for files.
        schema: the Arrow schema of Parquet; None of other files, whose values say what they are.
    """

    name: str
    rows: Rows
    columns: tuple[str, ...] | None = None
    textual: bool = False
    revision: str | None = None
    schema: Any = None


@dataclass
class OpenedDataset:
    """A data set whose source was found and has the expected form.

    Args:
        revision: commit on the hub; None for files.
        rows: records and bad rows in the order of the source, read as they are asked for, once.
            Raises ``SourceError`` where the source ends before its time.
        rows_read: rows of the source read so far: a record may come from several rows, and rows
            that ``where`` leaves out give none.
    """

    revision: str | None
    rows: Iterator[Converted | BadRow]
    rows_read: int = field(default=0)

    def counting(self, rows: Rows) -> Rows:
        """Pass rows on and count them."""
        for row in rows:
            self.rows_read += 1
            yield row
