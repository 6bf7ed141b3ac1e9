"""Documents from files, folders and standard input: what encoding, indexing and search take.

Rows come from ``data/sources/files.py``; here they become texts with ids, and folders are walked.
What cannot be used is named with its file and line; it stops reading, or is left out and counted.
Next file: ``encoding/files.py``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvembed.core.errors import ConfigError, DataError
from nvembed.core.text_files import MAX_LINE, STDIN, ending_of, open_text_file, stdin_bytes
from nvembed.data.config import Column
from nvembed.data.records import BadRow, RowError
from nvembed.data.sources.files import FORMATS, open_file, open_stdin
from nvembed.data.sources.rows import ID_NAMES, Columns, Row, Table

_LINES = ".txt"  # a text per line where the file is given by its name, one text in a folder
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
        table: what the row is of: says whether its values are all texts (CSV) or of the types of an
            Arrow schema (Parquet).
    """

    id: str | None
    text: str
    metadata: dict[str, Any]
    place: str
    table: Table | None = field(default=None, compare=False, repr=False)


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
    columns: Mapping[str, Column] | None = None,
    keep_going: bool | None = False,
    skipped: Skipped | None = None,
    stdin: Path | None = None,
) -> Iterator[Document]:
    """Yield the documents of files, folders and stdin, in the order given.

    A ``.txt`` file (and stdin that does not begin with ``{`` or ``[``) is a document per line; a
    ``.md`` or ``.rst`` file, and every text file of a folder, is one document. A folder is walked
    by name, hidden files are passed over, and so are files of other kinds. All names may end in
    ``.gz`` but Parquet's.

    Args:
        paths: files, folders, or ``-`` for stdin.
        columns: where ``text`` and ``id`` are found, as in a recipe's ``columns``. Without, the
            text is ``text``, with the ``title`` in front where there is one (the BEIR layout), and
            the id is ``_id``, ``id`` or ``docid``.
        keep_going: leave bad rows out; None is no, of a command that has no such option.
        skipped: where these are counted.
        stdin: a file that holds standard input, where it was read before.

    Raises:
        ConfigError: ``columns`` names something else than text and id.
        DataError: a file is not there or cannot be read as what its name says; or, unless
            ``keep_going``, a row has no text or a wrong id, or is no row.
    """
    mapping = document_columns(columns or {})
    for path in paths:
        for found in _read(str(path), mapping, stdin):
            if isinstance(found, Document):
                yield found
            elif not keep_going:
                hint = "--keep-going leaves such lines out and counts them"
                raise DataError(
                    found.problem, where=found.place, hint=None if keep_going is None else hint
                )
            elif skipped is not None:
                skipped.add(found)


def document_columns(columns: Mapping[str, Column]) -> Columns:
    """Where the values of a document are found.

    Raises:
        ConfigError: something else than text and id is named.
    """
    unknown = [name for name in columns if name not in ("text", "id")]
    if unknown:
        raise ConfigError(
            f"documents have no {unknown[0]!r}", where="columns", expected="text=COLUMN, id=COLUMN"
        )
    return Columns(columns)


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


def _read(path: str, columns: Columns, stdin: Path | None) -> Iterator[Document | BadRow]:
    if path == STDIN:
        opener = stdin_bytes if stdin is None else lambda: open(stdin, "rb")
        table = open_stdin(opener, columns=columns.names("text") or columns.names("id"))
        yield from _of_rows(table, columns)
        return
    source = Path(path)
    if not source.is_dir():
        _check_file(source)
        yield from _read_file(source, columns)
        return
    files = _files_of(source)
    if not files:
        raise DataError("no documents in this folder", where=path, expected=_kinds())
    for file in files:
        if ending_of(file) in (_LINES, *_WHOLE):
            yield _whole(file, id=file.relative_to(source).as_posix())
        else:
            yield from _read_file(file, columns)


def _kinds() -> str:
    return f"names that end in {', '.join(FORMATS + _WHOLE)}"


def _check_file(path: Path) -> None:
    if not path.exists():
        raise DataError("no such file or folder", where=str(path), hint="Relative paths start here")


def _files_of(folder: Path) -> list[Path]:
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent, name) for name in sorted(names) if not name.startswith(".")]
    return [path for path in found if ending_of(path) in FORMATS + _WHOLE]


def _read_file(path: Path, columns: Columns) -> Iterator[Document | BadRow]:
    kind = ending_of(path)
    if kind in _WHOLE:
        yield _whole(path, id=path.name)
    elif kind in FORMATS:
        table = open_file(path)
        columns.check(table, () if columns.names("text") else ("text",))
        yield from _of_rows(table, columns)
    else:
        raise DataError(f"unknown kind of file {path.name!r}", where=str(path), expected=_kinds())


def _whole(path: Path, *, id: str) -> Document | BadRow:
    with open_text_file(path) as file:
        content = file.read(MAX_LINE + 1)
    if len(content) > MAX_LINE:
        return BadRow(str(path), f"the text is longer than {MAX_LINE // 2**20} MB")
    if not content.strip():
        return BadRow(str(path), "the file is empty")
    try:
        return Document(id, content.decode("utf-8"), {}, str(path))
    except UnicodeDecodeError:
        return BadRow(str(path), "not UTF-8 text")


def _of_rows(table: Table, columns: Columns) -> Iterator[Document | BadRow]:
    for row in table.rows:
        if isinstance(row, BadRow):
            yield row
            continue
        try:
            yield _of_row(row, columns, table)
        except RowError as bad:
            yield BadRow(row.place, str(bad))


def _of_row(row: Row, columns: Columns, table: Table) -> Document:
    values = row.values
    text = _need(columns, values, "text")
    key = columns.taken("text")
    if not isinstance(text, str):
        raise RowError(f'"{key}" is not a text')
    title = None if columns.names("text") else values.get("title")
    if isinstance(title, str) and title.strip():
        text = f"{title} {text}".strip()
    if not text.strip():
        raise RowError(f'"{key}" is empty')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON can spell half a surrogate pair; no tokenizer takes it.
        raise RowError(f'"{key}" holds half a character (a lone surrogate)') from error
    id, id_name = _id_of(values, columns)
    rest = {name: value for name, value in values.items() if name not in (key, id_name)}
    return Document(id, text, rest, row.place, table)


def _need(columns: Columns, values: dict[str, Any], name: str) -> Any:
    try:
        return columns.need(values, name)
    except RowError as bad:
        raise RowError(f"{bad} (--column {name}=NAME says which it is)") from bad


def _id_of(values: dict[str, Any], columns: Columns) -> tuple[str | None, str]:
    """The id and the column that it is of; an empty cell is no id."""
    if columns.names("id"):
        name = columns.taken("id")
        id = _need(columns, values, "id")
        if id is None or id == "":
            raise RowError(f'no id under "{name}"')
    else:
        there = (name for name in ID_NAMES if values.get(name) not in (None, ""))
        name = next(there, "id")
        id = values.get(name)
        id = None if id == "" else id
    if isinstance(id, float) and id.is_integer():
        id = int(id)  # of a column that pandas made wider, since some rows had none
    if id is not None and (isinstance(id, bool) or not isinstance(id, str | int)):
        raise RowError("the id is neither text nor integer")
    return (None if id is None else str(id)), name
