"""BEIR's layout: corpus, queries and judgements, read as BEIR, mteb and trec_eval read them.

    corpus, queries     rows with ``_id`` (or ``id``), ``text`` and, of documents, ``title``
    qrels/<split>       rows of ``query-id``, ``corpus-id``, ``score``

Each may have any format of ``data/sources/files.py``, compressed or not. Judgements may also be
text between tabs or white space, with or without a first line of names, and TREC's
``query 0 document grade``. Training (the layout ``beir`` of ``joins.py``) and evaluation
(``evaluation/retrieval_files.py``) both read through this file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvembed.core.errors import DataError, SourceError
from nvembed.core.text_files import numbered_lines, open_text_file, too_long
from nvembed.data.records import RowError
from nvembed.data.sources.columns import MISSING, Columns
from nvembed.data.sources.files import as_source_error, open_file
from nvembed.data.sources.rows import BadRow, Row, Rows, Table, Values

_SPLITS = ("test", "dev", "validation", "train")

_COLUMNS = ("query-id", "corpus-id", "score")
_TREC_COLUMNS = ("query-id", "iteration", "corpus-id", "score")
# In the order of preference where a folder has several.
_ROW_ENDINGS = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
_TEXT_ENDINGS = (".tsv", ".txt", ".trec", ".qrels", ".qrel")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)


# --- Which files there are ------------------------------------------------------------------------


def is_beir_folder(folder: Path) -> bool:
    """Whether a folder has a corpus, queries and judgements."""
    tables = all(find_rows(folder, name) is not None for name in ("corpus", "queries"))
    return tables and bool(judged_splits(folder))


def find_rows(folder: Path, name: str) -> Path | None:
    """Find a file of rows by its name without the ending; None where there is none."""
    return _find(folder, name, _ROW_ENDINGS)


def find_judgements(folder: Path, split: str) -> Path | None:
    """Find the judgements of a split; None where there are none."""
    return _find(folder / "qrels", split, _TEXT_ENDINGS + _ROW_ENDINGS)


def judged_splits(folder: Path) -> list[str]:
    """The splits of a folder: test, dev, validation, train, then others by name."""
    if not (folder / "qrels").is_dir():
        return []
    names = {path.name.partition(".")[0] for path in (folder / "qrels").iterdir()}
    found = [name for name in sorted(names) if name and find_judgements(folder, name)]
    return sorted(found, key=lambda name: _SPLITS.index(name) if name in _SPLITS else len(_SPLITS))


def first_split(folder: Path) -> str | None:
    """The split that is evaluated where nothing says which: the first of ``judged_splits``."""
    return next(iter(judged_splits(folder)), None)


def _find(folder: Path, name: str, endings: Sequence[str]) -> Path | None:
    if not folder.is_dir():
        return None
    files = {path.name.lower(): path for path in folder.iterdir() if path.is_file()}
    wanted = (f"{name}{ending}{packed}".lower() for ending in endings for packed in ("", ".gz"))
    return next((files[one] for one in wanted if one in files), None)


# --- Values ---------------------------------------------------------------------------------------


def read_id(value: Any) -> str:
    """Read an id: a text, or a whole number as its digits (copies of a set mix 7, 7.0 and "7").

    Raises:
        RowError: it is something else, or empty.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise RowError(f"an id is {type(value).__name__}, expected a text or a number")
    if not (text := str(value).strip()):
        raise RowError("an id is empty, expected a text or a number")
    return text


def read_grade(value: Any) -> float:
    """Read a finite number, or a text that spells one.

    Raises:
        RowError: it is something else.
    """
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    shown = repr(value) if isinstance(value, str | int | float) else type(value).__name__
    raise RowError(f'"score" is {shown[:60]}, expected a number')


def join_texts(parts: Sequence[Any]) -> str:
    """Join title and text by a space, as mteb does; parts may be null.

    Raises:
        RowError: a part is no text.
    """
    if not all(isinstance(part, str) for part in parts if part is not None):
        raise RowError('"text" is no text' if len(parts) == 1 else '"title" or "text" is no text')
    return " ".join(part or "" for part in parts).strip()


# --- Judgements -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Judgement:
    """How relevant a document is to a query: above 0, or not.

    Attributes:
        grade: a finite number.
        place: ``file:line`` of the row.
        again: the pair was judged before, so that only this row counts.
        differs: it was judged otherwise before.
    """

    grade: float
    place: str
    again: bool = False
    differs: bool = False


Judgements = dict[str, dict[str, Judgement]]
"""By query, then by document, in the order of the rows."""


def read_judgements(rows: Rows, columns: Columns) -> Generator[BadRow, None, Judgements]:
    """Read all judgements, and yield the rows that are none.

    Of a pair that is judged twice the last row counts, as in BEIR and mteb. Rows without a column
    ``score`` are all relevant.

    Args:
        rows: of ``open_judgements``, or any table with the columns.
        columns: where ``query-id``, ``corpus-id`` and ``score`` are found.
    """
    found: Judgements = {}
    for row in rows:
        if isinstance(row, BadRow):
            yield row
            continue
        try:
            query = read_id(columns.need(row.values, "query-id"))
            document = read_id(columns.need(row.values, "corpus-id"))
            score = columns.find(row.values, "score")
            grade = 1.0 if score is MISSING or score is None else read_grade(score)
        except RowError as bad:
            yield BadRow(row.place, str(bad))
            continue
        of_query = found.setdefault(query, {})
        before = of_query.get(document)
        of_query[document] = Judgement(
            grade,
            row.place,
            again=before is not None,
            differs=before is not None and (before.differs or before.grade != grade),
        )
    return found


def open_judgements(path: Path) -> Table:
    """Open the judgements of a split: text as at the top of this file, or a file of rows.

    Raises:
        SourceError: the file cannot be read, or is empty.
    """
    name = str(path)
    ending = Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()
    if ending not in _TEXT_ENDINGS:
        table = open_file(path)
        if table.textual and table.columns and _names_of(table.columns) is None:
            return open_file(path, header=_default_names(table.columns))
        return table
    if not path.is_file():
        raise SourceError("no such file", where=name)
    first = next((cells for _, cells in _lines(path) if cells), None)
    if first is None:
        raise SourceError("the file is empty", where=name, expected="judgements")
    if isinstance(first, str):
        raise SourceError(first, where=f"{name}:1")
    names = _names_of(first)
    columns = _default_names(first) if names is None else names
    return Table(name, _text_rows(path, columns, skip=names is not None), columns, textual=True)


def _names_of(cells: Sequence[str]) -> tuple[str, ...] | None:
    """The names of the columns, where the first line has them; None where it is a row."""
    return None if _NUMBER.fullmatch(cells[-1]) and len(cells) in (3, 4) else tuple(cells)


def _default_names(cells: Sequence[str]) -> tuple[str, ...]:
    return _TREC_COLUMNS if len(cells) == len(_TREC_COLUMNS) else _COLUMNS


def _text_rows(path: Path, columns: tuple[str, ...], *, skip: bool) -> Rows:
    for number, cells in _lines(path):
        if not cells:
            continue
        if skip:
            skip = False
            continue
        place = f"{path}:{number}"
        if isinstance(cells, str):
            yield BadRow(place, cells)
            continue
        if len(cells) != len(columns):
            cells = " ".join(cells).split()
        if len(cells) != len(columns):
            yield BadRow(
                place, f"{len(cells)} columns, expected {len(columns)}: {', '.join(columns)}"
            )
            continue
        values: Values = dict(zip(columns, cells, strict=True))
        yield Row(place, values)


def _lines(path: Path) -> Iterator[tuple[int, list[str] | str]]:
    """Yield (number from 1, cells of the line or what is wrong with it)."""
    try:
        with open_text_file(path) as file:
            for number, line in numbered_lines(file):
                try:
                    yield number, too_long() if line is None else _cells(line.decode("utf-8"))
                except UnicodeDecodeError:
                    yield number, "not UTF-8 text"
    except SourceError:
        raise
    except DataError as error:
        raise as_source_error(error) from error


def _cells(line: str) -> list[str]:
    """Split between tabs, where an id may hold spaces, or else at white space."""
    cells = [cell.strip() for cell in line.split("\t")] if "\t" in line else line.split()
    while cells and not cells[-1]:
        cells.pop()
    return cells if len(cells) > 2 else " ".join(cells).split()
