"""Files of rows: JSONL, JSON, CSV, TSV, text (each also ``.gz``), Parquet and standard input.

The one place that knows what the kinds of files look like, for training, encoding, indexing, search
and mining. A broken line becomes a bad row and reading goes on; a broken file is an error. Memory
is bounded: rows are read as they are asked for, and a line of more than 64 MB is not kept. Next
file: ``data/sources/layouts.py``.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from itertools import chain
from pathlib import Path
from typing import IO, Any, Literal

from nvembed.core.errors import DataError, SourceError
from nvembed.core.text_files import (
    MAX_LINE,
    STDIN_NAME,
    ending_of,
    is_gzip,
    numbered_lines,
    open_bytes,
    parse_json,
    peeked,
    stdin_bytes,
    too_long,
)
from nvembed.data.record_files import open_parquet, parquet_rows
from nvembed.data.sources.rows import BadRow, Row, Rows, Table

MAX_JSON = 1024 * 2**20  # bytes of a JSON list, which is read as a whole
FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")

Open = Callable[[], IO[bytes]]
Binary = Callable[[], AbstractContextManager[io.BufferedReader]]


def open_file(
    path: Path,
    *,
    name: str | None = None,
    header: Sequence[str] | None = None,
    quotes: bool | None = None,
) -> Table:
    """Open a file of rows.

    Args:
        path: the file.
        name: what places and errors call it; its ending says the format. None is the path.
        header: columns of a CSV or TSV file that does not name them in its first line.
        quotes: whether its fields may be in quotes; None is yes for CSV, no for TSV.

    Raises:
        SourceError: no such file, an unknown ending, or a file that is not what its ending says.
    """
    name = str(path) if name is None else name
    form = _format(name, header, quotes)
    if not path.is_file():
        raise SourceError(
            "no such file", where=name, hint="Relative paths start at the folder of the recipe"
        )
    if form == ".parquet":
        try:
            with open_parquet(path) as file:
                schema = file.schema_arrow
        except DataError as error:
            raise as_source_error(error) from error
        _check_distinct(schema.names, name)
        rows = _guarded(lambda: _parquet(path, name))
        return Table(name, rows, tuple(schema.names), schema=schema)
    return open_stream(lambda: open(path, "rb"), name, header=header, quotes=quotes)


def open_stream(
    opener: Open, name: str, *, header: Sequence[str] | None = None, quotes: bool | None = None
) -> Table:
    """Open rows that come as bytes: all formats but Parquet.

    Args:
        opener: opens the bytes, once for the header and once for the rows.
        name: path or address; its ending says the format.
        header: as of ``open_file``.
        quotes: as of ``open_file``.

    Raises:
        SourceError: as of ``open_file``.
    """
    form = _format(name, header, quotes)

    def binary() -> AbstractContextManager[io.BufferedReader]:
        return open_bytes(opener, name)

    if form in (".jsonl", ".json"):
        return Table(name, _guarded(lambda: _json(binary, name, lines=form == ".jsonl")))
    if form == ".txt":
        return Table(name, _guarded(lambda: _texts(binary, name)), ("text",), textual=True)
    quoted = quotes if quotes is not None else form == ".csv"
    delimiter = "," if form == ".csv" else "\t"

    def records() -> Iterator[tuple[int, list[str] | str]]:
        return _fields(binary, delimiter, quoted)

    if header is not None:
        columns = tuple(header)
    else:
        with closing(_guarded(records)) as beginning:
            columns = _header(beginning, name)
    rows = _guarded(lambda: _named(records(), name, columns, skip=header is None))
    return Table(name, rows, columns, textual=True)


def open_stdin(opener: Open = stdin_bytes, *, columns: bool = False) -> Table:
    """Open standard input: JSON where it begins with ``{`` or ``[``, else a text per line.

    Args:
        opener: opens its bytes, where they were read before.
        columns: whether columns are named, so that lines of text are not what was meant.

    Raises:
        SourceError: it is neither, or has no columns.
    """

    def rows() -> Rows:
        with open_bytes(opener, STDIN_NAME) as file:
            beginning, stream = peeked(file)
            if beginning.startswith(b"PAR1"):
                raise DataError(
                    "Parquet cannot be read from a stream",
                    where=STDIN_NAME,
                    hint="Give the file by its name",
                )
            is_json = beginning.lstrip()[:1] in (b"{", b"[")
            if columns and not is_json and beginning.strip():
                raise DataError(
                    "--column is given, and these are lines of text",
                    where=STDIN_NAME,
                    expected="JSON",
                    hint="A table in CSV or TSV is read from a file",
                )
            yield from (_json_of if is_json else _texts_of)(stream, STDIN_NAME)

    return Table(STDIN_NAME, _guarded(rows))


def _format(name: str, header: Sequence[str] | None, quotes: bool | None) -> str:
    form = ending_of(name)
    if form not in FORMATS or (form == ".parquet" and is_gzip(name)):
        raise SourceError(
            f"unknown kind of file {Path(name).name!r}",
            where=name,
            expected=f"a name that ends in {', '.join(FORMATS)} (text also with .gz)",
        )
    if (header is not None or quotes is not None) and form not in (".csv", ".tsv"):
        raise SourceError("header and quotes are of CSV and TSV files only", where=name)
    return form


def _guarded(make: Callable[[], Iterator[Any]]) -> Generator[Any, None, None]:
    """Pass rows on; what breaks the whole file becomes a SourceError."""
    try:
        yield from make()
    except SourceError:
        raise
    except DataError as error:
        raise as_source_error(error) from error


def as_source_error(error: DataError) -> SourceError:
    """The same error, of a source of training data."""
    return SourceError(error.message, where=error.where, expected=error.expected, hint=error.hint)


def _parquet(path: Path, name: str) -> Rows:
    for number, values in parquet_rows(path):
        yield Row(f"{name}:{number}", values)


# --- Text -----------------------------------------------------------------------------------------


def _texts(binary: Binary, name: str) -> Rows:
    with binary() as file:
        yield from _texts_of(file, name)


def _texts_of(file: IO[bytes], name: str) -> Rows:
    """A row with the column ``text`` per line that is not blank."""
    for number, line in numbered_lines(file, MAX_LINE):
        place = f"{name}:{number}"
        if line is None:
            yield BadRow(place, too_long(MAX_LINE))
        elif stripped := line.strip():
            try:
                yield Row(place, {"text": stripped.decode("utf-8")})
            except UnicodeDecodeError:
                yield BadRow(place, "not UTF-8 text")


# --- JSON -----------------------------------------------------------------------------------------


def _json(binary: Binary, name: str, *, lines: bool) -> Rows:
    with binary() as file:
        yield from _json_of(file, name, lines=lines)


def _json_of(file: io.BufferedReader, name: str, *, lines: bool = False) -> Rows:
    """Objects by line; or one list or object, which is read as a whole.

    Args:
        file: the bytes.
        name: of the file.
        lines: a list that ends on its line is one row, unless it holds nothing but objects.
    """
    beginning, file = peeked(file)
    numbered = numbered_lines(file, MAX_LINE)
    head: list[tuple[int, bytes | None]] = []
    if lines or beginning.lstrip()[:1] != b"[":
        for number, line in numbered:
            head.append((number, line))
            if line is None or sum(bool(line.strip()) for _, line in head if line) == 2:
                break
        if not _spans_lines([line for _, line in head]):
            yield from _json_lines(chain(head, numbered), name)
            return
    whole = b"".join(line for _, line in head if line) + file.read(MAX_JSON)
    if len(whole) >= MAX_JSON:
        raise SourceError("a JSON list of 1 GB or more", where=name, hint="Turn it into JSONL")
    try:
        found = parse_json(whole, name)
    except DataError as error:
        if whole.lstrip().startswith(b"{") or _is_json(whole.lstrip().partition(b"\n")[0]):
            # Lines after all.
            yield from _json_lines(numbered_lines(io.BytesIO(whole), MAX_LINE), name)
            return
        hint = "Lines of text that begin with [ go into a .txt file" if name == STDIN_NAME else None
        raise SourceError(
            error.message, where=name, expected="a JSON list, or JSONL", hint=hint
        ) from error
    if not isinstance(found, list):
        yield _json_row(found, f"{name}:1")
        return
    for number, item in enumerate(found, start=1):
        values = {"text": item} if isinstance(item, str) else item
        yield _json_row(values, f"{name}:item {number}")


def _spans_lines(head: Sequence[bytes | None]) -> bool:
    """Whether JSON that begins with these lines, up to two of them not blank, is one value."""
    filled = [line for line in head if line is None or line.strip()]
    if not filled or filled[0] is None or filled[-1] is None:
        return False
    if not filled[0].lstrip().startswith((b"{", b"[")):
        return False
    if not _is_json(filled[0]):
        is_list = filled[0].lstrip().startswith(b"[")
        return is_list or (len(filled) == 2 and not filled[-1].lstrip().startswith(b"{"))
    value = parse_json(filled[0], "") if len(filled) == 1 else None
    return isinstance(value, list) and bool(value) and all(isinstance(i, dict) for i in value)


def _is_json(line: bytes) -> bool:
    try:
        parse_json(line, "")
    except DataError:
        return False
    return True


def _json_lines(lines: Iterator[tuple[int, bytes | None]], name: str) -> Rows:
    for number, line in lines:
        place = f"{name}:{number}"
        if line is None:
            yield BadRow(place, too_long(MAX_LINE))
        elif line.strip():
            try:
                yield _json_row(parse_json(line, place), place)
            except DataError as error:
                yield BadRow(place, error.message)


def _json_row(value: Any, place: str) -> Row | BadRow:
    if isinstance(value, dict):
        return Row(place, value)
    if isinstance(value, list):  # columns without names: they are called by their number
        return Row(place, {str(number): item for number, item in enumerate(value)})
    return BadRow(place, f"the line holds {type(value).__name__}, expected an object")


# --- CSV and TSV ----------------------------------------------------------------------------------


class _TextLines:
    """Lines of a delimited file as texts, and what was wrong with them.

    Args:
        binary: the file.
    """

    def __init__(self, binary: io.BufferedReader) -> None:
        self.number = 0
        self.broken: list[int] = []
        self.too_long: list[int] = []
        self._lines = numbered_lines(binary, MAX_LINE)

    def __iter__(self) -> Iterator[str]:
        for number, line in self._lines:
            self.number = number
            if line is None:
                self.too_long.append(self.number)
                continue
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError:
                self.broken.append(self.number)
                yield line.decode("utf-8", errors="replace")


def _fields(binary: Binary, delimiter: str, quotes: bool) -> Iterator[tuple[int, list[str] | str]]:
    """Yield (line it starts on, fields, or what is wrong) for every record of a delimited file."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE))  # the default is 128 kB
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    with binary() as file:
        lines = _TextLines(file)
        reader = csv.reader(iter(lines), delimiter=delimiter, quoting=quoting, strict=True)
        while True:
            start = lines.number + 1
            found: list[str] | str
            try:
                found = next(reader)
            except StopIteration:
                found = []
            except csv.Error as error:
                found = f"not a row of fields ({error})"
                if "unexpected end of data" in str(error):
                    found = "a quote is opened here and never closed"
            for number in lines.too_long:
                yield number, too_long(MAX_LINE)
            if found:
                yield start, "not UTF-8 text" if lines.broken else found
            elif lines.number < start:  # nothing was read: the end
                return
            lines.broken.clear()
            lines.too_long.clear()


def _header(records: Iterator[tuple[int, list[str] | str]], name: str) -> tuple[str, ...]:
    """The names of the columns from the first line."""
    number, found = next(records, (1, "the file is empty"))
    if isinstance(found, str):
        raise SourceError(found, where=f"{name}:{number}", expected="a line of column names")
    names = [field.strip() for field in found]
    # As pandas calls columns without a name, which it writes for the numbers of its rows.
    columns = tuple(name or f"Unnamed: {place}" for place, name in enumerate(names))
    _check_distinct(columns, f"{name}:{number}")
    return columns


def _check_distinct(columns: Sequence[str], where: str) -> None:
    if len(set(columns)) < len(columns):
        raise SourceError(
            f"columns share a name: {', '.join(columns)}",
            where=where,
            hint="Does the file begin with a row? Then give the names as `header`",
        )


def _named(
    records: Iterator[tuple[int, list[str] | str]],
    name: str,
    columns: tuple[str, ...],
    *,
    skip: bool,
) -> Rows:
    if skip:
        next(records, None)
    for number, found in records:
        place = f"{name}:{number}"
        if isinstance(found, str):
            yield BadRow(place, found)
        elif len(found) != len(columns):
            yield BadRow(place, f"{len(found)} fields, expected {len(columns)}")
        else:
            yield Row(place, dict(zip(columns, found, strict=True)))
