"""Documents from files: JSONL, JSON, CSV, TSV (each also ``.gz``), Parquet, text, folders, stdin.

Rows are read as they are asked for, so memory does not grow with the files. What cannot be used is
named with its file and line; it stops reading, or is left out and counted. Next file:
``inference/files.py``.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from nvembed.core.errors import DataError
from nvembed.data.sources.files import MAX_LINE, open_file, open_stream
from nvembed.data.sources.rows import BadRow, Row, Rows

STDIN = "-"
_TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_LINES = (".txt",)
_WHOLE = (".md", ".markdown", ".rst")
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Document:
    """One text of an input.

    Attributes:
        id: of the row; the path inside its folder for a text file; None where there is none.
        text: what is embedded.
        metadata: the other columns of the row.
        place: ``file:line`` (``file:row`` of Parquet), or the file.
    """

    id: str | None
    text: str
    metadata: dict[str, Any]
    place: str


@dataclass
class Skipped:
    """Bad rows that were left out: how many, and the first of them."""

    count: int = 0
    first: list[BadRow] = field(default_factory=list)

    def add(self, bad: BadRow) -> None:
        """Count one."""
        self.count += 1
        if len(self.first) < _SHOWN:
            self.first.append(bad)


def read_documents(
    paths: Sequence[str | Path],
    *,
    text_key: str | None = None,
    id_key: str | None = None,
    keep_going: bool | None = False,
    skipped: Skipped | None = None,
) -> Iterator[Document]:
    """Yield the documents of files, folders and stdin, in the order given.

    A ``.txt`` file (and stdin that does not begin with ``{``) is a document per line; a ``.md`` or
    ``.rst`` file, and every text file of a folder, is one document. A folder is walked by name,
    hidden files are passed over, and so are files of other kinds. All names may end in ``.gz`` but
    Parquet's.

    Args:
        paths: files, folders, or ``-`` for stdin.
        text_key: column of the text; None is ``text``, with the ``title`` in front where there is
            one (the BEIR layout).
        id_key: column of the id; None is ``_id``, else ``id``.
        keep_going: leave bad rows out; None is no, of a command that has no such option.
        skipped: where these are counted.

    Raises:
        DataError: a file is not there or cannot be read as what its name says; or, unless
            ``keep_going``, a row has no text or a wrong id, or is no row.
    """
    for path in paths:
        for found in _read(str(path), text_key, id_key):
            if isinstance(found, Document):
                yield found
            elif not keep_going:
                hint = "--keep-going leaves such lines out and counts them"
                raise DataError(
                    found.problem, where=found.place, hint=None if keep_going is None else hint
                )
            elif skipped is not None:
                skipped.add(found)


def input_files(paths: Sequence[str | Path]) -> list[Path]:
    """The files that ``read_documents`` would read, stdin left out.

    Raises:
        DataError: one of the paths is not there.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found.extend(_files_of(path))
        elif str(path) != STDIN:
            _check_file(path)
            found.append(path)
    return found


def _read(path: str, text_key: str | None, id_key: str | None) -> Iterator[Document | BadRow]:
    if path == STDIN:
        yield from _read_stdin(text_key, id_key)
        return
    source = Path(path)
    if not source.is_dir():
        _check_file(source)
        yield from _read_file(source, text_key, id_key)
        return
    files = _files_of(source)
    if not files:
        raise DataError("no documents in this folder", where=path, expected=_kinds())
    for file in files:
        if _kind(file) in _TABLES:
            yield from _read_file(file, text_key, id_key)
        else:
            yield _whole(file, id=file.relative_to(source).as_posix())


def _kind(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _kinds() -> str:
    return f"names that end in {', '.join(_TABLES + _LINES + _WHOLE)}"


def _check_file(path: Path) -> None:
    if not path.exists():
        raise DataError("no such file or folder", where=str(path), hint="Relative paths start here")


def _files_of(folder: Path) -> list[Path]:
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent, name) for name in sorted(names) if not name.startswith(".")]
    return [path for path in found if _kind(path) in _TABLES + _LINES + _WHOLE]


def _read_file(path: Path, text_key: str | None, id_key: str | None) -> Iterator[Document | BadRow]:
    kind = _kind(path)
    if kind in _TABLES:
        yield from _of_rows(open_file(path).rows, text_key, id_key)
    elif kind in _WHOLE:
        yield _whole(path, id=path.name)
    elif kind in _LINES:
        try:
            with _opened(path) as lines:
                yield from _of_lines(lines, str(path))
        except (OSError, EOFError, zlib.error) as error:
            raise _unreadable(error, path) from error
    else:
        raise DataError(f"unknown kind of file {path.name!r}", where=str(path), expected=_kinds())


def _read_stdin(text_key: str | None, id_key: str | None) -> Iterator[Document | BadRow]:
    stream = sys.stdin.buffer
    lines = stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(stream)  # type: ignore[type-var]
    if lines.peek(1).lstrip()[:1] == b"{":
        yield from _of_rows(open_stream(lambda: lines, "stdin.jsonl").rows, text_key, id_key)
    else:
        yield from _of_lines(lines, "stdin")


def _opened(path: Path) -> Any:
    return gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb")


def _unreadable(error: Exception, path: Path) -> DataError:
    return DataError(f"cannot be read ({error})", where=str(path))


def _of_lines(lines: IO[bytes], name: str) -> Iterator[Document | BadRow]:
    """A document per line that is not blank."""
    number = 0
    while line := lines.readline(MAX_LINE):
        number += 1
        place = f"{name}:{number}"
        if len(line) == MAX_LINE and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = lines.readline(MAX_LINE)
            yield BadRow(place, f"the line is longer than {MAX_LINE // 2**20} MB")
        elif line.strip():
            yield _of_bytes(line.strip(), place, None)


def _whole(path: Path, *, id: str) -> Document | BadRow:
    try:
        with _opened(path) as file:
            content = file.read(MAX_LINE + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(error, path) from error
    if len(content) > MAX_LINE:
        return BadRow(str(path), f"the text is longer than {MAX_LINE // 2**20} MB")
    if not content.strip():
        return BadRow(str(path), "the file is empty")
    return _of_bytes(content, str(path), id)


def _of_bytes(content: bytes, place: str, id: str | None) -> Document | BadRow:
    try:
        return Document(id, content.decode("utf-8-sig"), {}, place)
    except UnicodeDecodeError:
        return BadRow(place, "not UTF-8 text")


def _of_rows(rows: Rows, text_key: str | None, id_key: str | None) -> Iterator[Document | BadRow]:
    for row in rows:
        yield row if isinstance(row, BadRow) else _of_row(row, text_key, id_key)


def _of_row(row: Row, text_key: str | None, id_key: str | None) -> Document | BadRow:
    values = row.values
    key = text_key or "text"
    text = values.get(key)
    if not isinstance(text, str):
        known = ", ".join(json.dumps(name) for name in list(values)[:8])
        problem = f'"{key}" is not a text' if key in values else f'no key "{key}" (keys: {known})'
        return BadRow(row.place, problem)
    title = values.get("title") if text_key is None else None
    if isinstance(title, str) and title.strip():
        text = f"{title} {text}".strip()
    if not text.strip():
        return BadRow(row.place, f'"{key}" is empty')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        # JSON can spell half a surrogate pair; no tokenizer takes it.
        return BadRow(row.place, f'"{key}" holds half a character (a lone surrogate)')
    id_name = id_key or ("_id" if values.get("_id") is not None else "id")
    id = values.get(id_name)
    if id is None and id_key is not None:
        return BadRow(row.place, f'no id under "{id_key}"')
    if id is not None and (isinstance(id, bool) or not isinstance(id, str | int)):
        return BadRow(row.place, "the id is neither text nor integer")
    rest = {name: value for name, value in values.items() if name not in (key, id_name)}
    return Document(None if id is None else str(id), text, rest, row.place)
