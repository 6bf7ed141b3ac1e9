"""Files of rows: JSONL, JSON, CSV, TSV (each also ``.gz``) and Parquet.

A broken line becomes a bad row and reading goes on; a broken file is an error. Memory is bounded:
rows are read as they are asked for, and a line of more than 64 MB is not kept. Next file:
``data/sources/layouts.py``.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from nvembed.core.errors import DataError, SourceError
from nvembed.core.files import parse_json
from nvembed.data.record_files import open_parquet, parquet_rows
from nvembed.data.sources.rows import BadRow, Row, Rows, Table

MAX_LINE = 64 * 2**20  # bytes
MAX_JSON = 1024 * 2**20  # bytes of a JSON list, which is read as a whole
_FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")

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
                columns = tuple(file.schema_arrow.names)
        except DataError as error:
            raise _as_source_error(error) from error
        return Table(name, _parquet(path, name), columns)
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

    @contextmanager
    def binary() -> Iterator[io.BufferedReader]:
        with ExitStack() as opened:
            stream: Any = opened.enter_context(opener())
            if name.endswith(".gz"):
                stream = opened.enter_context(gzip.GzipFile(fileobj=stream))
            if not isinstance(stream, io.BufferedReader):
                stream = opened.enter_context(io.BufferedReader(stream))
            yield stream

    if form == ".jsonl":
        return Table(name, _guarded(name, lambda: _json_lines(binary, name)))
    if form == ".json":
        return Table(name, _guarded(name, lambda: _json(binary, name)))
    quoted = quotes if quotes is not None else form == ".csv"
    delimiter = "," if form == ".csv" else "\t"

    def records() -> Iterator[tuple[int, list[str] | str]]:
        return _fields(binary, delimiter, quoted)

    if header is not None:
        columns = tuple(header)
    else:
        with closing(_guarded(name, records)) as beginning:
            columns = _header(beginning, name)
    rows = _guarded(name, lambda: _named(records(), name, columns, skip=header is None))
    return Table(name, rows, columns, textual=True)


def _format(name: str, header: Sequence[str] | None, quotes: bool | None) -> str:
    form = Path(name.removesuffix(".gz")).suffix
    if form not in _FORMATS or (form == ".parquet" and name.endswith(".gz")):
        raise SourceError(
            f"unknown kind of file {Path(name).name!r}",
            where=name,
            expected=f"a name that ends in {', '.join(_FORMATS)} (text also with .gz)",
        )
    if (header is not None or quotes is not None) and form not in (".csv", ".tsv"):
        raise SourceError("header and quotes are of CSV and TSV files only", where=name)
    return form


def _guarded(name: str, make: Callable[[], Iterator[Any]]) -> Generator[Any, None, None]:
    """Pass rows on; what breaks the whole file becomes a SourceError."""
    try:
        yield from make()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SourceError(
            f"broken gzip file ({error})", where=name, hint="Copy or download it again"
        ) from error
    except OSError as error:
        raise SourceError(f"cannot read: {error.strerror or error}", where=name) from error


def _as_source_error(error: DataError) -> SourceError:
    return SourceError(error.message, where=error.where, expected=error.expected, hint=error.hint)


def _parquet(path: Path, name: str) -> Rows:
    try:
        for number, values in parquet_rows(path):
            yield Row(f"{name}:{number}", values)
    except DataError as error:
        raise _as_source_error(error) from error


# --- JSON -----------------------------------------------------------------------------------------


def _json_lines(binary: Binary, name: str) -> Rows:
    with binary() as file:
        for number, line in _lines(file):
            place = f"{name}:{number}"
            if line is None:
                yield _too_long(place)
            elif line.strip():
                try:
                    yield _json_row(parse_json(line, place), place)
                except DataError as error:
                    yield BadRow(place, error.message)


def _json(binary: Binary, name: str) -> Rows:
    """A list of objects, read as a whole, or else lines."""
    with binary() as file:
        whole = file.read(MAX_JSON) if file.peek(1).lstrip().startswith(b"[") else None
    if whole is None:
        yield from _json_lines(binary, name)
        return
    if len(whole) >= MAX_JSON:
        raise SourceError("a JSON list of 1 GB or more", where=name, hint="Turn it into JSONL")
    try:
        items = parse_json(whole, name)
    except DataError as error:
        raise SourceError(error.message, where=name, expected="a JSON list, or JSONL") from error
    for number, item in enumerate(items, start=1):
        place = f"{name}:item {number}"
        yield _json_row(item, place)


def _json_row(value: Any, place: str) -> Row | BadRow:
    if isinstance(value, dict):
        return Row(place, value)
    if isinstance(value, list):  # columns without names: they are called by their number
        return Row(place, {str(number): item for number, item in enumerate(value)})
    return BadRow(place, f"the line holds {type(value).__name__}, expected an object")


def _lines(binary: io.BufferedReader) -> Iterator[tuple[int, bytes | None]]:
    """Yield (number from 1, line), None for a line that is too long to be kept."""
    number = 0
    while line := binary.readline(MAX_LINE):
        number += 1
        if len(line) < MAX_LINE or line.endswith(b"\n"):
            yield number, line
            continue
        while len(line) == MAX_LINE and not line.endswith(b"\n"):
            line = binary.readline(MAX_LINE)
        yield number, None


def _too_long(place: str) -> BadRow:
    return BadRow(place, f"the line is longer than {MAX_LINE // 2**20} MB")


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
        self._lines = _lines(binary)

    def __iter__(self) -> Iterator[str]:
        for number, line in self._lines:
            self.number = number
            if line is None:
                self.too_long.append(self.number)
                continue
            if self.number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
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
                yield number, f"the line is longer than {MAX_LINE // 2**20} MB"
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
    columns = tuple(field.strip() for field in found)
    if len(set(columns)) < len(columns):
        raise SourceError(
            f"columns share a name: {', '.join(columns)}",
            where=f"{name}:{number}",
            hint="Does the file begin with a row? Then give the names as `header`",
        )
    return columns


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
