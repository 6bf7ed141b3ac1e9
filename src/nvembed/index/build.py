"""Files of documents into a database: what is new or changed is embedded, the rest is left alone.

Documents are taken in windows; each window is one change of the database. The same command over the
same files therefore goes on where it was killed. No window is prefetched: which of its texts are to
be embedded is known when the one before is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvembed.core.arguments import PrecisionChoice
from nvembed.core.errors import ConfigError, DataError
from nvembed.core.files import open_text_file
from nvembed.core.outputs import check_folder_name
from nvembed.core.ownership import check_outputs
from nvembed.core.reporting import progress
from nvembed.data.config import Column
from nvembed.data.records import BadRow
from nvembed.encoding.embed import WINDOW_TEXTS, encode_window
from nvembed.encoding.encoder import Encoder
from nvembed.encoding.reading import Document, Skipped, input_files, read_documents
from nvembed.index.database import ANN_ABOVE, INDEX, Database, is_database, text_hash, writing
from nvembed.index.fields import Fields, FieldTypes, same
from nvembed.index.search import first_dimensions, new_record, recorded_encoder
from nvembed.text.instructions import read_task


@dataclass
class IndexReport:
    """What was done, in numbers of documents."""

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    embedded: int = 0  # texts that went through the model
    deleted: int = 0
    total: int = 0
    skipped: Skipped = field(default_factory=Skipped)  # lines left out
    absent_fields: set[str] = field(default_factory=set)  # to be kept, and no document has them


@dataclass(frozen=True, slots=True)
class IndexOptions:
    """How documents are read and kept.

    Attributes:
        columns: where text and id are found, see ``read_documents``; a document without an id is
            named by its text.
        fields: keys to keep for filters; None keeps all.
        keep_going: leave bad lines out and count them.
        ann_above: number of documents from which on search is approximate.
    """

    columns: Mapping[str, Column] | None = None
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
        dtype: type of the weights, see ``load_encoder``; fixed when the database is made.
        delete: ids to remove, after the documents are written.
        options: how documents are read and kept.

    Raises:
        ConfigError: a new database without a model, settings that differ from the database's, or
            the database is an input or lies in one.
        DataError: a line cannot be used. What came before it is in the database.
        ModelError: another model than the database's.
    """
    options = options or IndexOptions()
    check_folder_name(path)
    named = model if isinstance(model, str) else None
    check_outputs((), made_by=INDEX, inputs=[*documents, named], places=[path])
    if not is_database(path) and (model is None or not documents):
        missing = "documents" if model is not None else "a model"
        raise ConfigError(f"a new database needs {missing}", where=str(path))
    input_files(documents)  # one that is missing is told before a database is made
    report = IndexReport(absent_fields=set(options.fields or ()) if documents else set())
    with writing(path):
        encoder: Encoder | None = None
        if is_database(path):
            database = Database.open(path)
            _check_settings(database, read_task(task, None), truncate_dim, dtype)
            if documents:
                encoder = recorded_encoder(database.record, model, dtype, str(path))
        else:
            assert model is not None
            record, encoder = new_record(model, task, truncate_dim, dtype)
            database = Database.create(path, record)
        if encoder is not None:
            _Writer(database, encoder, options, report).write(documents)
        report.deleted = database.delete(delete)
        database.tidy(options.ann_above)
    report.total = database.count()
    return report


def _check_settings(
    database: Database, task: str | None, truncate_dim: int | None, dtype: PrecisionChoice | None
) -> None:
    record = database.record
    fixed = None if dtype == "auto" or record.dtype is None else dtype
    for what, given, kept in (
        ("truncate_dim", truncate_dim, record.dimension),
        ("task", task, record.task),
        ("dtype", fixed, record.dtype),
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

    def write(self, paths: Sequence[str | Path]) -> None:
        columns, keep_going = self.options.columns, self.options.keep_going
        documents = read_documents(
            paths, columns=columns, keep_going=keep_going, skipped=self.report.skipped
        )
        with progress(None, "index") as bar:
            while window := list(islice(documents, WINDOW_TEXTS)):
                self._write_window(window)
                bar.advance(len(window), embedded=self.report.embedded)

    def _write_window(self, window: list[Document]) -> None:
        rows = self._checked(window)
        known = {row["id"]: row for row in self.database.get("id", list(rows))}
        new: list[str] = []
        for id, (text, fields) in rows.items():
            old = known.get(id)
            if old is not None and old["text"] == text and same(old["fields"], fields):
                self.report.unchanged += 1
                continue
            self.report.added += old is None
            self.report.updated += old is not None
            new.append(id)
        if new:
            texts = [rows[id][0] for id in new]
            vectors = self._vectors(texts)
            self.database.upsert(new, texts, [rows[id][1] for id in new], vectors)

    def _checked(self, window: list[Document]) -> dict[str, tuple[str, Fields]]:
        """Check fields and make new columns; of several documents with one id the last counts."""

        def refuse(number: int, error: DataError) -> None:
            place = window[number].place
            if not self.options.keep_going:
                raise DataError(
                    error.message, where=place, expected=error.expected, hint=error.hint
                ) from error
            self.report.skipped.add(BadRow(place, error.message))

        before = self.database.fields
        types = FieldTypes(before)
        kept = types.settle([(self._wanted(doc), doc.table) for doc in window], refuse)
        rows: dict[str, tuple[str, Fields]] = {}
        for doc, fields in zip(window, kept, strict=True):
            if fields is not None:
                id = doc.id if doc.id is not None else text_hash(doc.text)
                rows.pop(id, None)
                rows[id] = (doc.text, fields)
        for name, type in types.found.items():
            if name in before and type != before[name]:
                self.database.widen(name, type)
        self.database.add_fields({n: type for n, type in types.found.items() if n not in before})
        return rows

    def _wanted(self, doc: Document) -> dict[str, Any]:
        wanted = self.options.fields
        if wanted is None:
            return doc.metadata
        self.report.absent_fields -= doc.metadata.keys()
        return {name: doc.metadata[name] for name in wanted if name in doc.metadata}

    def _vectors(self, texts: list[str]) -> NDArray[np.float32]:
        """Vectors ``(N, D)``: from the database where it has the text, else once from the model."""
        by_hash = {text_hash(text): text for text in texts}
        found = {r["text_hash"]: r["vector"] for r in self.database.get("text_hash", [*by_hash])}
        missing = [key for key in by_hash if key not in found]
        if missing:
            made = encode_window(self.encoder, [by_hash[key] for key in missing], side="document")
            short = first_dimensions(made, self.database.record.dimension)
            found |= dict(zip(missing, short, strict=True))
            self.report.embedded += len(missing)
        return np.stack([found[text_hash(text)] for text in texts])


def read_ids(path: Path) -> list[str]:
    """Read a file of ids, one per line; empty lines are passed over."""
    with open_text_file(path) as file:
        try:
            lines = file.read().decode("utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise DataError("not UTF-8 text", where=str(path)) from error
    return [id for line in lines if (id := line.strip())]
