"""Files of documents into a database: what is new or changed is embedded, the rest is left alone.

Documents are taken in windows; each window is one change of the database. The same command over the
same files therefore goes on where it was killed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvembed.core.errors import ConfigError, DataError
from nvembed.core.ownership import check_outputs
from nvembed.core.progress import progress
from nvembed.data.sources.rows import BadRow
from nvembed.index.database import ANN_ABOVE, INDEX, Database, is_database, text_hash, writing
from nvembed.index.record import first_dimensions, new_record, recorded_encoder
from nvembed.index.where import FieldType
from nvembed.inference.encoding import WINDOW_TEXTS, encode_window
from nvembed.inference.load import load_encoder
from nvembed.inference.protocol import Encoder
from nvembed.inference.reading import Document, Skipped, read_documents
from nvembed.model.settings import PrecisionChoice

_RESERVED = {"id", "_id", "text", "text_hash", "vector"}
_NAME = re.compile(r"[^\W_][\w -]*", re.ASCII)
_TABLE_PLACE = re.compile(r"\.[ct]sv(\.gz)?:\d+$")
_NUMBER = re.compile(r"[-+]?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?")


@dataclass
class IndexReport:
    """What was done.

    Attributes:
        added: documents with ids that were not there.
        updated: documents whose text or fields changed.
        unchanged: documents that were there as they are.
        embedded: texts that went through the model.
        deleted: documents removed.
        total: documents in the database now.
        skipped: lines left out.
    """

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    embedded: int = 0
    deleted: int = 0
    total: int = 0
    skipped: Skipped = field(default_factory=Skipped)


@dataclass(frozen=True, slots=True)
class IndexOptions:
    """How documents are read and kept.

    Attributes:
        text_key: key of the text, see ``read_documents``.
        id_key: key of the id; a document without one is named by its text.
        fields: keys to keep for filters; None keeps all.
        keep_going: leave bad lines out and count them.
        ann_above: number of documents from which on search is approximate.
    """

    text_key: str | None = None
    id_key: str | None = None
    fields: tuple[str, ...] | None = None
    keep_going: bool = False
    ann_above: int = ANN_ABOVE


def index_documents(
    path: Path,
    documents: Sequence[str | Path],
    *,
    model: str | Encoder | None,
    task: str | None = None,
    truncate_dim: int | None = None,
    dtype: PrecisionChoice | None = None,
    delete: Sequence[str] = (),
    options: IndexOptions | None = None,
) -> IndexReport:
    """Write documents into a database, made where there is none, and delete others.

    Args:
        path: folder of the database.
        documents: files, folders or ``-``; see ``read_documents``. None at all is allowed.
        model: folder, hub id or encoder; None is the one that the database was made with.
        task: instruction of queries that bring none; only for a new database.
        truncate_dim: keep the first dimensions only; only for a new database.
        dtype: of the weights, see ``load_encoder``.
        delete: ids to remove, after the documents are written.
        options: how documents are read and kept.

    Raises:
        ConfigError: a new database without a model, settings that differ from the database's, or
            the database is an input or lies in one.
        DataError: a line cannot be used. What came before it is in the database.
        ModelError: another model than the database's.
    """
    options = options or IndexOptions()
    report = IndexReport()
    named = model if isinstance(model, str) else None
    check_outputs((), made_by=INDEX, inputs=[*documents, named], places=[path])
    if not is_database(path) and (model is None or not documents):
        missing = "documents" if model is not None else "a model"
        raise ConfigError(f"a new database needs {missing}", where=str(path))
    with writing(path):
        if is_database(path):
            database = Database.open(path)
            _check_settings(database, task, truncate_dim)
            encoder = (
                recorded_encoder(database.record, model, dtype, str(path)) if documents else None
            )
        else:
            assert model is not None
            encoder = load_encoder(model, dtype) if isinstance(model, str) else model
            record = new_record(model, encoder, task=task, truncate_dim=truncate_dim)
            database = Database.create(path, record)
        if encoder is not None:
            read = read_documents(
                documents,
                text_key=options.text_key,
                id_key=options.id_key,
                keep_going=options.keep_going,
                skipped=report.skipped,
            )
            _Writer(database, encoder, options, report).write(read)
        report.deleted = database.delete(list(delete))
        database.tidy(options.ann_above)
    report.total = database.count()
    return report


def _check_settings(database: Database, task: str | None, truncate_dim: int | None) -> None:
    record = database.record
    for what, given, kept in (
        ("truncate_dim", truncate_dim, record.dimension),
        ("task", task, record.task),
    ):
        if given is not None and given != kept:
            raise ConfigError(
                f"{what} is {given!r}, the database has {kept!r}",
                where=str(database.path),
                hint="It is fixed when a database is made; leave it out, or make a new one",
            )


@dataclass
class _Writer:
    database: Database
    encoder: Encoder
    options: IndexOptions
    report: IndexReport

    def write(self, documents: Iterator[Document]) -> None:
        with progress(None, "index") as bar:
            while window := list(islice(documents, WINDOW_TEXTS)):
                self._write_window(window)
                bar.advance(len(window), embedded=self.report.embedded)

    def _write_window(self, window: list[Document]) -> None:
        rows = self._checked(window)
        known = {row["id"]: row for row in self.database.get("id", list(rows))}
        fields = self.database.fields
        new: list[str] = []
        for id, (text, values) in rows.items():
            old = known.get(id)
            if old is None:
                self.report.added += 1
            elif old["text"] == text and all(old[n] == values.get(n) for n in fields):
                self.report.unchanged += 1
                continue
            else:
                self.report.updated += 1
            new.append(id)
        if new:
            texts = [rows[id][0] for id in new]
            vectors = self._vectors(texts)
            self.database.upsert(new, texts, [rows[id][1] for id in new], vectors)

    def _checked(self, window: list[Document]) -> dict[str, tuple[str, dict[str, Any]]]:
        """Check fields and make new columns; of several documents with one id the last counts."""
        known = self.database.fields
        kept = [(doc, self._named(doc)) for doc in window]
        # CSV holds texts only: a column of numbers is one whose every value here is a number.
        words = {
            name
            for doc, values in kept
            if _TABLE_PLACE.search(doc.place)
            for name, value in values.items()
            if value and not _NUMBER.fullmatch(value)
        }
        rows: dict[str, tuple[str, dict[str, Any]]] = {}
        for doc, named in kept:
            values = named
            if _TABLE_PLACE.search(doc.place):
                values = {
                    name: _from_table(value, known.get(name, "text" if name in words else "number"))
                    for name, value in named.items()
                }
            try:
                plain = {name: _plain(name, value, doc.place) for name, value in values.items()}
                _check_types(plain, known, doc.place)
            except DataError as error:
                if not self.options.keep_going:
                    raise
                self.report.skipped.add(BadRow(doc.place, error.message))
                continue
            known |= {n: _type(v) for n, v in plain.items() if v is not None and n not in known}
            id = doc.id if doc.id is not None else text_hash(doc.text)
            rows.pop(id, None)
            rows[id] = (doc.text, {n: v for n, v in plain.items() if v is not None})
        there = self.database.fields
        self.database.add_fields({n: kind for n, kind in known.items() if n not in there})
        return rows

    def _named(self, doc: Document) -> dict[str, Any]:
        wanted = self.options.fields
        names = [n for n in doc.metadata if wanted is None or n in wanted]
        return {name: doc.metadata[name] for name in names}

    def _vectors(self, texts: list[str]) -> NDArray[np.float32]:
        """Vectors ``(N, D)``: from the database where it has the text, else once from the model."""
        hashes = [text_hash(text) for text in texts]
        by_hash = dict(zip(hashes, texts, strict=True))
        found = {r["text_hash"]: r["vector"] for r in self.database.get("text_hash", [*by_hash])}
        missing = [key for key in by_hash if key not in found]
        if missing:
            made = encode_window(self.encoder, [by_hash[key] for key in missing], side="document")
            short = first_dimensions(made, self.database.record.dimension)
            found |= dict(zip(missing, short, strict=True))
            self.report.embedded += len(missing)
        return np.stack([found[key] for key in hashes])


def _from_table(value: str, kind: FieldType) -> Any:
    if value == "":
        return None
    if kind == "number" and _NUMBER.fullmatch(value):
        return float(value)
    if kind == "boolean" and value.lower() in ("true", "false"):
        return value.lower() == "true"
    return value


def _plain(name: str, value: Any, place: str) -> str | float | bool | None:
    """Bring a value to one of the column types; lists and objects become their JSON."""
    if name in _RESERVED or not _NAME.fullmatch(name):
        raise DataError(
            f"a field cannot be called {name!r}",
            where=place,
            expected="a letter or digit, then letters, digits, _, - and spaces",
            hint="--fields names those to keep",
        )
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number) or number != value:
            raise DataError(
                f'"{name}" is a number that 64 bits do not hold', where=place, expected="a text"
            )
        return number
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def _type(value: str | float | bool) -> FieldType:
    if isinstance(value, bool):
        return "boolean"
    return "text" if isinstance(value, str) else "number"


def _check_types(values: dict[str, Any], known: dict[str, FieldType], place: str) -> None:
    for name, value in values.items():
        if value is not None and known.get(name, _type(value)) != _type(value):
            raise DataError(
                f'"{name}" is a {_type(value)}, in the documents before it a {known[name]}',
                where=place,
                hint="Make them alike, or keep other fields only with --fields",
            )


def read_ids(path: Path) -> list[str]:
    """Read a file of ids, one per line; empty lines are passed over.

    Raises:
        DataError: it is not there or not UTF-8 text.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataError(f"cannot be read ({reason})", where=str(path)) from error
    return [id for line in lines if (id := line.strip())]
