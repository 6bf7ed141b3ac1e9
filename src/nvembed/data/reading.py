"""Documents from files, folders and standard input: what encoding, indexing and search take."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvembed.core.errors import ConfigError, DataError
from nvembed.core.files import MAX_LINE, STDIN, ending_of, open_text_file, stdin_bytes
from nvembed.data.config import Column
from nvembed.data.records import BadRow, RowError
from nvembed.data.sources.files import FORMATS, open_file, open_stdin
from nvembed.data.sources.rows import ID_NAMES, Columns, Row, Table

# Files that are one text; so is a .txt file of a folder. One that is given by its name has a text
# per line.
_WHOLE = (".md", ".markdown", ".rst")
_KINDS = FORMATS + _WHOLE
_EXPECTED = f"names that end in {', '.join(_KINDS)}"
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Document:
    """One text of an input."""

    id: str | None  # of the row, or the path of a text file inside its folder
    text: str
    metadata: dict[str, Any]  # the other columns of the row
    place: str  # file:line, file:row of Parquet, or the file
    # Says whether the values are all texts (CSV) or of the types of an Arrow schema (Parquet).
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
    if unknown := [name for name in columns or () if name not in ("text", "id")]:
        raise ConfigError(
            f"documents have no {unknown[0]!r}", where="columns", expected="text=COLUMN, id=COLUMN"
        )
    mapping = Columns(columns or {})
    for path in paths:
        for found in _read(str(path), mapping, stdin):
            if isinstance(found, Document):
                yield found
            elif not keep_going:
                hint = "--keep-going leaves such lines out and counts them"
                hinted = None if keep_going is None else hint
                raise DataError(found.problem, where=found.place, hint=hinted)
            elif skipped is not None:
                skipped.add(found)


def input_files(paths: Sequence[str | Path]) -> list[Path]:
    """Return the files that ``read_documents`` would read; a DataError where a path is missing."""
    return [file for path in paths if str(path) != STDIN for file in _files_of(Path(path))]


def _files_of(path: Path) -> list[Path]:
    """Return the file, or the files of the folder that can be read."""
    if not path.exists():
        raise DataError("no such file or folder", where=str(path), hint="Relative paths start here")
    if not path.is_dir():
        return [path]
    return [file for file in walk(path) if ending_of(file) in _KINDS]


def walk(folder: Path) -> list[Path]:
    """All files of a folder by name, but for hidden ones."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent, name) for name in sorted(names) if not name.startswith(".")]
    return found


def _read(path: str, columns: Columns, stdin: Path | None) -> Iterator[Document | BadRow]:
    if path == STDIN:
        opener = stdin_bytes if stdin is None else lambda: open(stdin, "rb")
        named = columns.names("text") or columns.names("id")
        yield from _of_table(open_stdin(opener, columns=named), columns)
        return
    source, files = Path(path), _files_of(Path(path))
    if not files:
        raise DataError("no documents in this folder", where=path, expected=_EXPECTED)
    for file in files:
        kind, alone = ending_of(file), file == source
        if kind in _WHOLE or (kind == ".txt" and not alone):
            yield _whole(file, file.name if alone else file.relative_to(source).as_posix())
        elif kind in FORMATS:
            table = open_file(file)
            columns.check(table, () if columns.names("text") else ("text",))
            yield from _of_table(table, columns)
        else:
            raise DataError(f"unknown kind of file {file.name!r}", where=path, expected=_EXPECTED)


def _whole(path: Path, id: str) -> Document | BadRow:
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


def _of_table(table: Table, columns: Columns) -> Iterator[Document | BadRow]:
    for row in table.rows:
        try:
            yield row if isinstance(row, BadRow) else _of_row(row, columns, table)
        except RowError as bad:
            yield BadRow(row.place, str(bad))


def _of_row(row: Row, columns: Columns, table: Table) -> Document:
    values, key = row.values, columns.taken("text")
    text = _need(columns, values, "text")
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
    """Return the id and the name of its column; an empty cell is no id."""
    if columns.names("id"):
        name = columns.taken("id")
        id = _need(columns, values, "id")
        if id is None or id == "":
            raise RowError(f'no id under "{name}"')
    else:
        name = next((name for name in ID_NAMES if values.get(name) not in (None, "")), "id")
        id = values.get(name)
        if id is None or id == "":
            return None, name
    if isinstance(id, float) and id.is_integer():
        id = int(id)  # of a column that pandas made wider, since some rows had none
    if isinstance(id, bool) or not isinstance(id, str | int):
        raise RowError("the id is neither text nor integer")
    return str(id), name
