"""BEIR's layout: corpus, queries and judgements, read as BEIR, mteb and trec_eval read them.

Each may have any format of ``data/sources/files.py``. Judgements may also be text between tabs or
white space, with or without a first line of names, and TREC's ``query 0 document grade``. Training
(the layout ``beir``) and evaluation (``evaluation/retrieval_files.py``) both read through this.
"""

from __future__ import annotations

import math
import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvembed.core.errors import SourceError
from nvembed.core.files import ending_of, open_text_file
from nvembed.data.records import BadRow, RowError
from nvembed.data.sources.files import open_file, text_lines
from nvembed.data.sources.rows import MISSING, Columns, Row, Rows, Table, Values, all_rows, read_id

_SPLITS = ("test", "dev", "validation", "train")
# Columns where the first line does not name them, by their number; four are TREC's.
_DEFAULT_NAMES = {
    3: ("query-id", "corpus-id", "score"),
    4: ("query-id", "iteration", "corpus-id", "score"),
}
# In the order of preference where a folder has several.
_ROW_ENDINGS = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
_TEXT_ENDINGS = (".tsv", ".txt", ".trec", ".qrels", ".qrel")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)


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


@dataclass(frozen=True, slots=True)
class Judgement:
    """How relevant a document is to a query: above 0, or not, and the place of the row.

    ``again``: the pair was judged before, so that only this row counts; ``differs``: otherwise.
    """

    grade: float
    place: str
    again: bool = False
    differs: bool = False


Judgements = dict[str, dict[str, Judgement]]
"""By query, then by document, in the order of the rows."""


def read_judgements(rows: Rows, columns: Columns) -> Generator[BadRow, None, Judgements]:
    """Read all judgements, the last of a pair; without a column ``score`` all are relevant.

    Rows that are none are yielded.
    """

    def read(values: Values) -> Iterator[tuple[str, str, float]]:
        query = read_id(columns.need(values, "query-id"))
        document = read_id(columns.need(values, "corpus-id"))
        score = columns.find(values, "score")
        yield query, document, 1.0 if score is MISSING or score is None else _grade(score)

    found: Judgements = {}
    for place, (query, document, grade) in (yield from all_rows(rows, read)):
        of_query = found.setdefault(query, {})
        before = of_query.get(document)
        differs = before is not None and (before.differs or before.grade != grade)
        of_query[document] = Judgement(grade, place, before is not None, differs)
    return found


def _grade(value: Any) -> float:
    """Read a finite number, or a text that spells one."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    with suppress(OverflowError):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and math.isfinite(value):
            return float(value)
    shown = repr(value) if isinstance(value, str | int | float) else type(value).__name__
    raise RowError(f'"score" is {shown[:60]}, expected a number')


def open_judgements(path: Path) -> Table:
    """Open the judgements of a split: text as at the top of this file, or a file of rows."""
    name = str(path)
    if ending_of(path) not in _TEXT_ENDINGS:
        table = open_file(path)
        if table.textual and table.columns and _is_row(table.columns):
            return open_file(path, header=_DEFAULT_NAMES[len(table.columns)])
        return table
    if not path.is_file():
        raise SourceError("no such file", where=name)
    first = next((cells for _, cells in _lines(path) if cells), None)
    if first is None:
        raise SourceError("the file is empty", where=name, expected="judgements")
    if isinstance(first, str):
        raise SourceError(first, where=f"{name}:1")
    skip = not _is_row(first)
    columns = tuple(first) if skip else _DEFAULT_NAMES[len(first)]
    return Table(name, _text_rows(path, columns, skip=skip), columns, textual=True)


def _is_row(cells: Sequence[str]) -> bool:
    """Whether the first line is a row already, and does not name the columns."""
    return len(cells) in _DEFAULT_NAMES and bool(_NUMBER.fullmatch(cells[-1]))


def _text_rows(path: Path, columns: tuple[str, ...], *, skip: bool) -> Rows:
    for number, cells in _lines(path):
        if not cells or skip:
            skip = skip and not cells
            continue
        place = f"{path}:{number}"
        if not isinstance(cells, str) and len(cells) != len(columns):
            cells = " ".join(cells).split()
        if isinstance(cells, str):
            yield BadRow(place, cells)
        elif len(cells) != len(columns):
            told = f"{len(cells)} columns, expected {len(columns)}: {', '.join(columns)}"
            yield BadRow(place, told)
        else:
            yield Row(place, dict(zip(columns, cells, strict=True)))


def _lines(path: Path) -> Iterator[tuple[int, list[str] | str]]:
    """Yield (number from 1, cells of the line or what is wrong with it)."""
    with open_text_file(path) as file:
        for number, line, problem in text_lines(file):
            yield number, problem or _cells(line or "")


def _cells(line: str) -> list[str]:
    """Split between tabs, where an id may hold spaces, or else at white space."""
    cells = [cell.strip() for cell in line.split("\t")] if "\t" in line else line.split()
    while cells and not cells[-1]:
        cells.pop()
    return cells if len(cells) > 2 else " ".join(cells).split()
