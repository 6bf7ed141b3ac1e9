"""Files of rows: JSONL, JSON, CSV, TSV, text (each also ``.gz``), Parquet and standard input.

The one place that knows the kinds of files. A broken line becomes a bad row and reading goes on; a
broken file is an error. Rows are read as they are asked for, and a line of more than 64 MB is not
kept.
"""

from __future__ import annotations

import csv
import io
import string
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import IO, Any

from nvembed.core.errors import DataError, SourceError
from nvembed.core.files import (
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
from nvembed.data.records import BadRow
from nvembed.data.sources.rows import Row, Rows, Table

MAX_JSON = 1024 * 2**20  # bytes of a JSON list, which is read as a whole
FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
_PARQUET_ROWS = 1024  # in memory at once: texts may be long

Binary = Callable[[], AbstractContextManager[io.BufferedReader]]


def open_file(
    path: Path | str,
    *,
    name: str | None = None,
    header: Sequence[str] | None = None,
    quotes: bool | None = None,
    opener: Callable[[], IO[bytes]] | None = None,
) -> Table:
    """Open a file of rows; ``name`` is what errors call it, and its ending says the format.

    ``header`` names the columns of a CSV or TSV file that does not do so in its first line, and
    ``quotes`` says whether fields may be in quotes (by default of CSV). A TSV file has tabs; a CSV
    file whose first line has no commas may have semicolons or tabs, where it is clear which.
    ``opener`` opens a stream of another format than Parquet, several times where it has columns.
    """
    name = str(path) if name is None else name
    form = ending_of(name)
    if form not in FORMATS or (form == ".parquet" and is_gzip(name)):
        raise SourceError(
            f"unknown kind of file {Path(name).name!r}",
            where=name,
            expected=f"a name that ends in {', '.join(FORMATS)} (text also with .gz)",
        )
    if (header is not None or quotes is not None) and form not in (".csv", ".tsv"):
        raise SourceError("header and quotes are of CSV and TSV files only", where=name)
    if opener is None and not Path(path).is_file():
        hint = "Relative paths in a recipe start at its folder"
        raise SourceError("no such file", where=name, hint=hint)
    if form == ".parquet":
        return _parquet(Path(path), name)

    def binary() -> AbstractContextManager[io.BufferedReader]:
        return open_bytes(opener or (lambda: open(path, "rb")), name)

    if form in (".csv", ".tsv"):
        fields = partial(_fields, binary, form == ".csv" if quotes is None else quotes)
        separator = _separator(fields, name, header) if form == ".csv" else "\t"
        return _delimited(partial(fields, separator), name, header)
    is_text = form == ".txt"
    read = _texts if is_text else partial(_json, lines=form == ".jsonl")

    def rows() -> Rows:
        with binary() as file:
            yield from read(file, name)

    return Table(name, rows(), ("text",) if is_text else None, textual=is_text)


def open_stdin(opener: Callable[[], IO[bytes]] = stdin_bytes, *, columns: bool = False) -> Table:
    """Open standard input: JSON where it begins with ``{`` or ``[``, else a text per line.

    ``columns``: they are named, so that lines of text are an error. ``opener`` opens its bytes.
    """

    def rows() -> Rows:
        with open_bytes(opener, STDIN_NAME) as file:
            beginning, stream = peeked(file)
            if beginning.startswith(b"PAR1"):
                message, hint = "Parquet cannot be read from a stream", "Give the file by its name"
                raise SourceError(message, where=STDIN_NAME, hint=hint)
            is_json = beginning.lstrip()[:1] in (b"{", b"[")
            if columns and not is_json and beginning.strip():
                raise SourceError(
                    "--column is given, and these are lines of text",
                    where=STDIN_NAME,
                    expected="JSON",
                    hint="A table in CSV or TSV is read from a file",
                )
            yield from (_json if is_json else _texts)(stream, STDIN_NAME)

    return Table(STDIN_NAME, rows())


# --- Parquet --------------------------------------------------------------------------------------


def shard_files(folder: Path) -> list[Path]:
    """The Parquet files of a built set, in order."""
    return sorted(folder.glob("part-*.parquet"))


def parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row number from 1, object) of a Parquet file, or of all shards of a built set."""
    files = shard_files(path) if path.is_dir() else [path]
    if not files:
        expected = "part-00000.parquet and so on"
        raise DataError("no training file here", where=str(path), expected=expected)
    numbers = count(1)
    for one in files:
        with _open_parquet(one) as file:
            try:
                for batch in file.iter_batches(batch_size=_PARQUET_ROWS, use_threads=False):
                    for row in batch.to_pylist():
                        yield next(numbers), row
            except (ValueError, OSError) as error:  # errors of pyarrow are one or the other
                raise _not_parquet(one, error) from error


def _parquet(path: Path, name: str) -> Table:
    with _open_parquet(path) as file:
        schema = file.schema_arrow
    _check_distinct(schema.names, name)
    rows = (Row(f"{name}:{number}", values) for number, values in parquet_rows(path))
    return Table(name, rows, tuple(schema.names), schema=schema)


def _open_parquet(path: Path) -> Any:
    """Open a Parquet file: a ``pyarrow.parquet.ParquetFile``."""
    if not path.is_file():
        raise DataError("no such file", where=str(path), expected="a Parquet file")
    try:
        import pyarrow.parquet
    except ImportError as error:
        hint = "Run `pip install pyarrow`, or convert the file to JSONL"
        raise DataError("reading Parquet needs pyarrow", where=str(path), hint=hint) from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise _not_parquet(path, error) from error


def _not_parquet(path: Path, error: Exception) -> DataError:
    reason = str(error).splitlines()[0]
    return DataError(f"not a readable Parquet file ({reason})", where=str(path))


def text_lines(file: IO[bytes]) -> Iterator[tuple[int, str | None, str]]:
    """Yield (number from 1, line, what is wrong with it); None for a line that is not kept."""
    for number, line in numbered_lines(file, MAX_LINE):
        if line is None:
            yield number, None, too_long(MAX_LINE)
            continue
        try:
            yield number, line.decode("utf-8"), ""
        except UnicodeDecodeError:
            yield number, line.decode("utf-8", errors="replace"), "not UTF-8 text"


def _texts(file: IO[bytes], name: str) -> Rows:
    """A row with the column ``text`` per line that is not blank."""
    for number, line, problem in text_lines(file):
        if problem:
            yield BadRow(f"{name}:{number}", problem)
        elif line and (text := line.strip(string.whitespace)):
            yield Row(f"{name}:{number}", {"text": text})


# --- JSON -----------------------------------------------------------------------------------------


def _json(file: io.BufferedReader, name: str, *, lines: bool = False) -> Rows:
    """Objects by line; or one list or object, which is read as a whole.

    With ``lines``, a list that ends on its line is one row, unless it holds nothing but objects.
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
    if isinstance(value, list):  # columns without names: they are called by their number
        value = {str(number): item for number, item in enumerate(value)}
    if isinstance(value, dict):
        return Row(place, value)
    return BadRow(place, f"the line holds {type(value).__name__}, expected an object")


# --- CSV and TSV ----------------------------------------------------------------------------------

# The line that a record starts on, and its fields, or what is wrong with it.
_Fields = Iterator[tuple[int, list[str] | str]]


def _separator(fields: Callable[[str], _Fields], name: str, header: Sequence[str] | None) -> str:
    """What separates the fields of a CSV file: commas, unless its first line fits another only."""

    def fits(separator: str) -> bool:
        _, found = _first(partial(fields, separator))
        if isinstance(found, str):
            return False
        return len(found) > 1 if header is None else len(found) == len(header)

    if fits(","):
        return ","
    others = [separator for separator in (";", "\t") if fits(separator)]
    if len(others) > 1:
        raise SourceError(
            "the first line may be separated by semicolons or by tabs",
            where=f"{name}:1",
            expected="commas, or one of these",
        )
    return others[0] if others else ","


def _first(fields: Callable[[], _Fields]) -> tuple[int, list[str] | str]:
    with closing(fields()) as beginning:  # type: ignore[type-var]
        return next(beginning, (1, "the file is empty"))


def _delimited(fields: Callable[[], _Fields], name: str, header: Sequence[str] | None) -> Table:
    columns = tuple(header or ())
    if header is None:
        number, found = _first(fields)
        if isinstance(found, str):
            raise SourceError(found, where=f"{name}:{number}", expected="a line of column names")
        names = [field.strip() for field in found]
        # As pandas calls columns without a name, which it writes for the numbers of its rows.
        columns = tuple(name or f"Unnamed: {place}" for place, name in enumerate(names))
        _check_distinct(columns, f"{name}:{number}")

    def rows() -> Rows:
        records = fields()
        if header is None:
            next(records, None)
        for number, found in records:
            place = f"{name}:{number}"
            if isinstance(found, str):
                yield BadRow(place, found)
            elif len(found) != len(columns):
                yield BadRow(place, f"{len(found)} fields, expected {len(columns)}")
            else:
                yield Row(place, dict(zip(columns, found, strict=True)))

    return Table(name, rows(), columns, textual=True)


def _fields(binary: Binary, quotes: bool, delimiter: str) -> _Fields:
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE))  # the default is 128 kB
    read = 0  # lines
    problems: dict[int, str] = {}  # of the lines of a record
    gigantic: dict[int, str] = {}

    def texts(file: io.BufferedReader) -> Iterator[str]:
        nonlocal read
        for read, line, problem in text_lines(file):
            if problem:
                (gigantic if line is None else problems)[read] = problem
            if line is not None:
                yield line

    with binary() as file:
        reader = csv.reader(
            texts(file),
            delimiter=delimiter,
            quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE,
            strict=True,
        )
        while True:
            start = read + 1
            found: list[str] | str
            try:
                found = next(reader, [])
            except csv.Error as error:
                found = f"not a row of fields ({error})"
                if "unexpected end of data" in str(error):
                    found = "a quote is opened here and never closed"
            yield from gigantic.items()
            if found:
                yield start, next(iter(problems.values()), found)
            elif read < start:  # nothing was read: the end
                return
            problems.clear()
            gigantic.clear()


def _check_distinct(columns: Sequence[str], where: str) -> None:
    if len(set(columns)) < len(columns):
        hint = "Does the file begin with a row? Then give the names as `header`"
        raise SourceError(f"columns share a name: {', '.join(columns)}", where=where, hint=hint)
