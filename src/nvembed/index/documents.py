"""What is indexed: rows of tables as they are, and files of text, HTML, PDF and code in passages.

What cannot be used of a folder is left out and counted; of a file given by its name it is an error.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from nvembed.core.errors import DataError, UserError
from nvembed.core.files import MAX_LINE, STDIN, ending_of, open_text_file
from nvembed.data.config import Column
from nvembed.data.reading import Document, Skipped, input_files, read_documents, walk
from nvembed.data.records import BadRow
from nvembed.data.sources.files import FORMATS, open_file
from nvembed.data.sources.rows import MISSING, Columns, Row
from nvembed.index.cutting import MARKDOWN, UNDERLINED
from nvembed.index.database import text_hash
from nvembed.index.passages import Cutter

_HTML = (".html", ".htm", ".xhtml")
_PDF = ".pdf"
_CODE = (
    *(".py", ".pyi", ".js", ".jsx", ".mjs", ".ts", ".tsx", ".java", ".kt", ".scala", ".c", ".h"),
    *(".cc", ".cpp", ".cxx", ".hpp", ".cu", ".cs", ".go", ".rs", ".rb", ".php", ".swift", ".m"),
    *(".r", ".jl", ".lua", ".pl", ".sh", ".bash", ".sql", ".hs", ".ml", ".ex", ".erl", ".clj"),
)
_CUT = (*MARKDOWN, *UNDERLINED, *_HTML, _PDF, *_CODE)
_EXPECTED = "names that end in .md, .rst, .txt, .html, .pdf, of code, .jsonl, .csv, .parquet …"
_NO_CONTENT = ("script", "style", "template", "noscript", "svg", "nav", "footer", "button")
_PERMALINKS = "a.headerlink, a.anchor, a.anchorjs-link"
# Of lines that end within a word, as pages of print have them.
_HYPHEN = re.compile(r"(?<=[a-zà-ÿ])-\n(?=[a-zà-ÿ])")


_NOTHING = ("empty", "without text")


class _Unusable(Exception):  # noqa: N818 - caught where it is known whether it is an error
    """A file that gives no text."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass
class LeftOut:
    """Files of folders that were passed over, by kind of problem."""

    kinds: Counter[str] = field(default_factory=Counter)
    endings: Counter[str] = field(default_factory=Counter)  # of files of other kinds
    first: str | None = None  # that cannot be read, and why

    def add(self, file: Path, problem: _Unusable | None = None) -> None:
        """Count a file; without a problem one of another kind."""
        if problem is None:
            self.endings[ending_of(file) or "no ending"] += 1
            return
        self.kinds[problem.kind] += 1
        if self.first is None and problem.kind == "unreadable":
            self.first = f"{file}: {problem!s:.100}"

    @property
    def count(self) -> int:
        """Number of files."""
        return self.kinds.total() + self.endings.total()

    def __str__(self) -> str:
        shown = [f"{end} {count}" for end, count in self.endings.most_common(5)]
        shown += ["…"] if len(self.endings) > 5 else []
        parts = [f"{count} {kind}" for kind, count in self.kinds.most_common()]
        if shown:
            parts.append(f"{self.endings.total()} of other kinds ({', '.join(shown)})")
        line = f"{self.count} file{'s' if self.count > 1 else ''} left out: {', '.join(parts)}"
        return line if self.first is None else f"{line}; the first unreadable: {self.first}"


class Group(NamedTuple):
    """What stands and falls together: a row, or the passages of a row or file."""

    documents: Sequence[Document]
    field: str | None = None  # says whose passages they are: "file", or "document" of a row
    name: str = ""  # its value


@dataclass
class Reader:
    """Reads what paths hold, which ``cutter`` cuts; None leaves files whole.

    ``skipped`` are bad rows, if they do not stop it, ``left_out`` files of folders. Without
    ``tables`` those of a folder are among these.
    """

    cutter: Cutter | None
    cut_rows: bool = False  # too
    columns: Mapping[str, Column] | None = None
    keep_going: bool = False
    skipped: Skipped = field(default_factory=Skipped)
    left_out: LeftOut = field(default_factory=LeftOut)
    tables: bool = True

    def groups(self, path: str) -> Iterator[Group]:
        """Yield what a path holds, of a folder in the order of names; see ``read_documents``."""
        source = Path(path)
        if path == STDIN or self.cutter is None:
            yield from self._rows(path)
            return
        alone = not source.is_dir()
        for file in _files_of(source):
            try:
                if ending_of(file) in _CUT:
                    id = file.name if alone else file.relative_to(source).as_posix()
                    yield _passages(file, id, self.cutter)
                elif ending_of(file) not in FORMATS or not self.tables:
                    self.left_out.add(file)
                else:
                    if not alone:
                        self._check_texts(file)
                    yield from self._rows(str(file))
            except _Unusable as problem:
                if alone:
                    raise DataError(str(problem), where=path) from problem
                self.left_out.add(file, problem)
                if problem.kind in _NOTHING:  # what it had before is gone
                    yield Group((), "file", os.path.abspath(file))

    def _rows(self, path: str) -> Iterator[Group]:
        columns, going = self.columns, self.keep_going
        for row in read_documents([path], columns=columns, keep_going=going, skipped=self.skipped):
            if self.cutter is None or not self.cut_rows:
                yield Group([row])
                continue
            named = replace(row, id=row.id or text_hash(row.text))
            cut = self.cutter.cut(named, "")
            parts = [replace(one, fields={"document": named.id, **one.fields}) for one in cut]
            yield Group(parts, "document", named.id or "")

    def _check_texts(self, file: Path) -> None:
        """Refuse a table whose first row has no text: folders hold settings and data too."""
        columns = Columns(self.columns or {})
        try:
            table = open_file(file)
            first = next(table.rows, None)
        except DataError as error:
            raise _Unusable("unreadable", error.message) from error
        try:
            columns.check(table, () if columns.names("text") else ("text",))
        except DataError as error:
            raise _Unusable("without texts", error.message) from error
        if isinstance(first, BadRow) and ending_of(file) == ".json":  # read as a whole
            raise _Unusable("unreadable", first.problem)
        if isinstance(first, Row) and columns.find(first.values, "text") is MISSING:
            raise _Unusable("without texts", "no column of texts")


def _files_of(source: Path) -> list[Path]:
    """All files of a folder, or a file itself; a DataError where none can hold documents."""
    alone = not source.is_dir()
    files = [source] if alone else walk(source)
    if not any(ending_of(file) in (*_CUT, *FORMATS) for file in files):
        what = f"unknown kind of file {source.name!r}" if alone else "no documents in it"
        raise DataError(what, where=str(source), expected=_EXPECTED)
    return files


def check_documents(
    paths: Sequence[str | Path],
    cut: bool,
    columns: Mapping[str, Column] | None,
    keep_going: bool,
) -> None:
    """Look at the first document of each path: what is wrong is told before a model is loaded.

    With ``cut``, as a ``Reader`` with a cutter has it.
    """
    input_files(paths)  # those that are missing are told first
    for path in map(Path, paths):
        in_passages = cut and (path.is_dir() or ending_of(path) in _CUT)
        if in_passages:
            _files_of(path)
        read = () if in_passages or str(path) == STDIN else (path,)
        next(read_documents(read, columns=columns, keep_going=keep_going), None)


def _passages(file: Path, id: str, cutter: Cutter) -> Group:
    text, ending, pages = _read(file)
    found: list[Document] = []
    line, counted, page = 1, 0, 0
    name = os.path.abspath(file)
    for passage in cutter.cut(Document(id, text, {}, str(file)), ending):
        fields, start = {"file": name, **passage.fields}, passage.fields["start"]
        place = str(file)
        if pages:
            while page < len(pages) and pages[page] <= start:
                page += 1
            fields["page"] = page
        elif ending_of(file) not in _HTML:
            line, counted = line + text.count("\n", counted, start), start
            fields["line"] = line
            place = f"{file}:{line}"
        found.append(replace(passage, fields=fields, place=place))
    return Group(found, "file", name)


# --- Files ----------------------------------------------------------------------------------------


def _read(file: Path) -> tuple[str, str, list[int]]:
    """Text, the ending that says its structure, and where its pages begin."""
    try:
        with open_text_file(file) as opened:
            content = opened.read(MAX_LINE + 1)
    except DataError as error:
        raise _Unusable("unreadable", error.message) from error
    if len(content) > MAX_LINE:
        raise _Unusable("too large", f"it has more than {MAX_LINE // 2**20} MB")
    if not content.strip():
        raise _Unusable("empty", "the file is empty")
    ending, pages = ending_of(file), list[int]()
    if ending == _PDF:
        text, pages = _pdf(content)
        ending = ""
    elif b"\0" in content[:8192]:
        raise _Unusable("binary", "a binary file, not text")
    elif ending in _HTML:
        text, ending = _html(content), MARKDOWN[0]
    else:
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _Unusable("unreadable", "not UTF-8 text") from error
    text = text if pages else re.sub("\r\n?", "\n", text)
    if not text.strip():
        raise _Unusable("without text", "it holds no text")
    return text, ending, pages


def _html(content: bytes) -> str:
    """The content of a page as Markdown, links and pictures as their words."""
    soup_of = _library("bs4", "HTML").BeautifulSoup
    converter = _library("markdownify", "HTML").MarkdownConverter
    try:
        with warnings.catch_warnings(action="ignore"):  # of pages that look like something else
            soup = soup_of(content, "html.parser")
        title = soup.title.get_text(" ", strip=True) if soup.title else ""
        for node in [*soup(list(_NO_CONTENT)), *soup.select(_PERMALINKS), *soup("head")]:
            node.decompose()
        main = soup.find("main") or soup.find(role="main") or soup.find("article") or soup
        as_written = {"escape_underscores": False, "escape_asterisks": False}
        markdown = converter(heading_style="atx", strip=["a", "img"], **as_written)
        body = markdown.convert_soup(main).strip()
    except Exception as error:  # any of two libraries
        raise _Unusable("unreadable", f"not readable as HTML ({error!r:.80})") from error
    return body if main.find("h1") or not (title and body) else f"# {title}\n\n{body}"


def _pdf(content: bytes) -> tuple[str, list[int]]:
    """The text of all pages, and where each begins."""
    pypdf = _library("pypdf", "PDF")
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it tells every oddity of a file
    try:
        reader = pypdf.PdfReader(BytesIO(content))
        if reader.is_encrypted:
            reader.decrypt("")
        pages = [page.extract_text() for page in reader.pages]
    except Exception as error:  # of many kinds, where a file is damaged
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _Unusable("unreadable", f"not readable as PDF ({reason:.80})") from error
    texts = [_plain(page) + "\n\n" for page in pages]
    return "".join(texts), [0, *accumulate(map(len, texts[:-1]))]


def _plain(text: str) -> str:
    """Text that any tokenizer takes, on lines that end as everywhere."""
    whole = text.encode("utf-8", "replace").decode("utf-8").replace("\0", "")
    return _HYPHEN.sub("", re.sub("\r\n?", "\n", whole)).strip()


def _library(name: str, kind: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        hint = "pip install 'nvembed[index]'"
        raise UserError(f"reading {kind} needs {name}", hint=hint) from error
