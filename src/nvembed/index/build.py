"""Files of documents into a database: what is new or changed is embedded, the rest is left alone.

Documents are taken in windows; each window is one change of the database. The same command over the
same files therefore goes on where it was killed. No window is prefetched: which of its texts are to
be embedded is known when the one before is written. The passages of a document are in one window,
and those that it no longer has are deleted after it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nvembed.core.arguments import PrecisionChoice, goes_on
from nvembed.core.errors import ConfigError, DataError
from nvembed.core.files import STDIN, open_text_file
from nvembed.core.outputs import check_folder_name
from nvembed.core.ownership import check_outputs
from nvembed.core.reporting import progress
from nvembed.data.config import Column
from nvembed.data.instructions import read_task
from nvembed.data.reading import Document, Skipped, walk
from nvembed.data.records import BadRow
from nvembed.index.database import ANN_ABOVE, INDEX, Database, is_database, text_hash, writing
from nvembed.index.documents import Group, LeftOut, Reader, check_documents
from nvembed.index.fields import Fields, FieldTypes, same
from nvembed.index.passages import (
    PASSAGE_TOKENS,
    PLACE_FIELDS,
    Cutter,
    Passage,
    id_in_file,
    is_passage_id,
    key_of,
    late_vectors,
)
from nvembed.index.search import first_dimensions, new_record, recorded_encoder
from nvembed.model.bulk import WINDOW_TEXTS, encode_window
from nvembed.model.encoder import Encoder, check_task, reading_limit


@dataclass
class IndexReport:
    """What was done, in numbers of documents."""

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    embedded: int = 0  # texts that went through the model
    deleted: int = 0
    total: int = 0
    unit: str = "document"  # or a passage, of the database
    documents: int = 0  # that were cut, into passages of at most so many tokens
    passages: int | None = None
    skipped: Skipped = field(default_factory=Skipped)  # lines left out
    left_out: LeftOut = field(default_factory=LeftOut)  # files of folders
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
        passages: most tokens of a passage, with its headings, as the model counts. ``auto`` is what
            the database was made with, and for a new one 256, or as many as the model reads; it
            leaves rows whole, which a number cuts too. None leaves files whole.
        long: ``late`` (late chunking) reads a document as a whole, as far as the model has
            positions, and pools the states of each passage; None is what the database was made
            with, and ``cut``, each passage by itself under its headings, for a new one.
    """

    columns: Mapping[str, Column] | None = None
    fields: tuple[str, ...] | None = None
    keep_going: bool = False
    ann_above: int = ANN_ABOVE
    passages: int | Literal["auto"] | None = "auto"
    long: Literal["cut", "late"] | None = None

    def __post_init__(self) -> None:
        """Refuse passages that no model could make."""
        if isinstance(self.passages, int) and self.passages < 1:
            message = f"{self.passages} tokens in a passage"
            raise ConfigError(message, where="passages", expected="at least 1")


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
        documents: files, folders or ``-``; see ``read_documents``. None at all is allowed. Files
            of text, HTML, PDF and code are cut into passages, unless ``options`` says otherwise.
        model: folder, hub id or encoder; None is the one that the database was made with.
        task: instruction of queries that bring none; only for a new database.
        truncate_dim: keep the first dimensions only; only for a new database.
        dtype: type of the weights, see ``load_encoder``; fixed when the database is made.
        delete: ids to remove, after the documents are written; of a document that was cut (the path
            of a file in its folder, the id of a row) with all its passages.
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
    _check_inputs(path, documents, named, task, options)
    report = IndexReport(absent_fields=set(options.fields or ()) if documents else set())
    with writing(path):
        encoder: Encoder | None = None
        if is_database(path):
            database = Database.open(path)
            _check_settings(database, options, read_task(task, None), truncate_dim, dtype)
            if documents:
                encoder = recorded_encoder(database.record, model, dtype, str(path))
        else:
            assert model is not None
            record, encoder = new_record(model, task, truncate_dim, dtype)
            update = _passage_settings(encoder, options)
            database = Database.create(path, record.model_copy(update=update))
        if encoder is not None:
            _Writer(database, encoder, options, report).write(documents)
        cut = database.passages("id", [f"{id}#" for id in delete], begins=True)
        report.deleted += database.delete([*delete, *filter(is_passage_id, cut)])
        database.tidy(options.ann_above)
    report.total, report.unit = database.count(), database.unit
    return report


def _check_inputs(
    path: Path,
    documents: Sequence[str | Path],
    model: str | None,
    task: str | None,
    options: IndexOptions,
) -> None:
    """Refuse what cannot be read, before a database is made and a model loaded."""
    if model is not None:
        check_task(model, task)
    known = is_database(path)
    if not known and options.passages is None and options.long == "late":
        raise ConfigError("late chunking", where="long", expected="passages")
    passages = Database.open(path).record.passages if known else options.passages
    check_documents(documents, passages is not None, options.columns, options.keep_going)


def _check_settings(
    database: Database,
    options: IndexOptions,
    task: str | None,
    truncate_dim: int | None,
    dtype: PrecisionChoice | None,
) -> None:
    """Refuse other settings than those that the database was made with."""
    record, wanted = database.record, options.passages
    goes_on_as_is = record.dtype is None or dtype is None or goes_on(dtype, record.dtype)
    settings: dict[str, tuple[object, object]] = {
        "truncate_dim": (truncate_dim, record.dimension),
        "task": (task, record.task),
        "dtype": (None if goes_on_as_is else dtype, record.dtype),
        "long": (options.long, record.long),
    }
    problems = [
        f"{name} is {given!r}, the database has {kept!r}"
        for name, (given, kept) in settings.items()
        if given is not None and given != kept
    ]
    if wanted != "auto" and (wanted, wanted is not None) != (record.passages, record.rows_cut):
        kept = "leaves documents whole"
        if record.passages is not None:
            what = "rows too" if record.rows_cut else "of files only"
            kept = f"has passages of {record.passages} tokens, {what}"
        problems.append(f"passages is {'none' if wanted is None else wanted}, the database {kept}")
    if problems:
        hint = "It is fixed when a database is made; leave it out, or make a new one"
        raise ConfigError(problems[0], where=str(database.path), hint=hint)


def _passage_settings(encoder: Encoder, options: IndexOptions) -> dict[str, object]:
    """What a new database keeps of how documents are cut."""
    _, limit = reading_limit(encoder)
    wanted, long = options.passages, options.long or "cut"
    if long == "late" and not hasattr(encoder, "prepare"):
        expected = "an NVEmbed model or a bare language model"
        raise ConfigError("late chunking", where="long", expected=expected)
    if wanted == "auto":
        return {"passages": min(PASSAGE_TOKENS, limit or PASSAGE_TOKENS), "long": long}
    if wanted is not None and limit is not None and wanted > limit:
        expected = f"1 to {limit}, which the model reads"
        raise ConfigError(f"{wanted} tokens in a passage", where="passages", expected=expected)
    return {"passages": wanted, "rows_cut": wanted is not None, "long": long}


def _windows(groups: Iterable[Group]) -> Iterator[list[Group]]:
    """Gather groups until they have as many documents as a window, or a few more."""
    window: list[Group] = []
    documents = 0
    for group in groups:
        window.append(group)
        documents += len(group.documents)
        if documents >= WINDOW_TEXTS:
            yield window
            window, documents = [], 0
    if window:
        yield window


@dataclass
class _Writer:
    database: Database
    encoder: Encoder
    options: IndexOptions
    report: IndexReport

    def write(self, paths: Sequence[str | Path]) -> None:
        record, report = self.database.record, self.report
        tokenizer, _ = reading_limit(self.encoder)
        cutter = None
        if record.passages is not None:
            cutter = Cutter(record.passages, tokenizer, record.long == "late")
        reader = Reader(
            cutter,
            record.rows_cut,
            self.options.columns,
            self.options.keep_going,
            report.skipped,
            report.left_out,
        )
        report.passages = record.passages
        groups = chain.from_iterable(reader.groups(str(path)) for path in paths)
        with progress(None, "index") as bar:
            for window in _windows(groups):
                self._write_window(window)
                bar.advance(sum(len(group.documents) for group in window), embedded=report.embedded)
        for path in paths:
            if record.passages is not None and str(path) != STDIN and Path(path).is_dir():
                self._delete_gone(Path(path))

    def _write_window(self, groups: list[Group]) -> None:
        groups = self._told_apart(groups)
        rows = self._checked([document for group in groups for document in group.documents])
        known = {row["id"]: row for row in self.database.get("id", list(rows))}
        new: list[str] = []
        for id, (doc, fields) in rows.items():
            old = known.get(id)
            made_of = (doc.text, key_of(doc))
            if (
                old is not None
                and (old["text"], old["text_hash"]) == made_of
                and same(old["fields"], fields)
            ):
                self.report.unchanged += 1
                continue
            self.report.added += old is None
            self.report.updated += old is not None
            new.append(id)
        if new:
            documents = [rows[id][0] for id in new]
            keys, vectors = self._vectors(documents)
            texts = [document.text for document in documents]
            self.database.upsert(new, texts, [rows[id][1] for id in new], vectors, keys)
        self._delete_former(groups)

    def _told_apart(self, groups: Sequence[Group]) -> list[Group]:
        """Let no two files share an id: folders may hold equal files under one path.

        An id goes over to another file only where the one that has it is no longer there.
        """
        of_files = [group for group in groups if group.field == "file"]
        rows = self.database.get("id", [str(d.id) for group in of_files for d in group.documents])
        owners = {row["id"]: row["fields"].get("file") for row in rows}
        found = []
        for group in groups:
            documents = []
            for doc in group.documents if group.field == "file" else ():
                id, owner = str(doc.id), owners.get(doc.id)
                if owner not in (None, group.name) and os.path.exists(owner):
                    id = id_in_file(id, group.name)
                owners[id] = group.name
                documents.append(replace(doc, id=id))
            found.append(group._replace(documents=documents) if group.field == "file" else group)
        return found

    def _delete_former(self, groups: Sequence[Group]) -> None:
        """Delete the passages that documents had and have no more."""
        for field_name in ("file", "document"):
            now = {g.name: {d.id for d in g.documents} for g in groups if g.field == field_name}
            self.report.documents += sum(map(bool, now.values()))
            before = self.database.passages(field_name, list(now))
            former = [id for id, name in before.items() if id not in now[name]]
            self.report.deleted += self.database.delete(list(filter(is_passage_id, former)))

    def _delete_gone(self, folder: Path) -> None:
        """Delete the passages of files that are no longer in a folder."""
        top = os.path.join(os.path.abspath(folder), "")
        here = {os.path.abspath(file) for file in walk(folder)}
        before = self.database.passages("file", [top], begins=True)
        gone = [id for id, file in before.items() if file not in here]
        self.report.deleted += self.database.delete(list(filter(is_passage_id, gone)))

    def _checked(self, window: list[Document]) -> dict[str, tuple[Document, Fields]]:
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
        rows: dict[str, tuple[Document, Fields]] = {}
        for doc, fields in zip(window, kept, strict=True):
            if fields is not None:
                id = doc.id if doc.id is not None else text_hash(doc.text)
                rows.pop(id, None)
                rows[id] = (doc, fields)
        for name, type in types.found.items():
            if name in before and type != before[name]:
                self.database.widen(name, type)
        self.database.add_fields({n: type for n, type in types.found.items() if n not in before})
        return rows

    def _wanted(self, doc: Document) -> dict[str, Any]:
        wanted, found = self.options.fields, doc.metadata
        if wanted is not None:
            self.report.absent_fields -= found.keys()
            found = {name: found[name] for name in wanted if name in found}
        if not isinstance(doc, Passage):
            return found
        if taken := [name for name in PLACE_FIELDS if name in found]:
            hint = "Call it otherwise, or keep other fields only with --fields"
            problem = f'the row has "{taken[0]}", which passages have of their own'
            raise DataError(problem, where=doc.place, hint=hint)
        textual = doc.table is not None and doc.table.textual
        return found | {n: str(v) if textual else v for n, v in doc.fields.items()}

    def _vectors(self, documents: list[Document]) -> tuple[list[str], NDArray[np.float32]]:
        """Keys of what the model reads, and vectors ``(N, D)``: each key goes through it once."""
        keys = [key_of(document) for document in documents]
        by_key = dict(zip(keys, documents, strict=True))
        found = {r["text_hash"]: r["vector"] for r in self.database.get("text_hash", [*by_key])}
        missing = {key: document for key, document in by_key.items() if key not in found}
        if missing:
            late = self.database.record.long == "late"
            made = late_vectors(self.encoder, missing) if late else {}
            alone = {key: doc for key, doc in missing.items() if key not in made}
            if alone:
                reads = [d.read if isinstance(d, Passage) else d.text for d in alone.values()]
                rows = encode_window(self.encoder, reads, side="document")
                made |= dict(zip(alone, rows, strict=True))
            short = first_dimensions(np.stack([*made.values()]), self.database.record.dimension)
            found |= dict(zip(made, short, strict=True))
            self.report.embedded += len(missing)
        return keys, np.stack([found[key] for key in keys])


def read_ids(path: Path) -> list[str]:
    """Read a file of ids, one per line; empty lines are passed over."""
    with open_text_file(path) as file:
        try:
            lines = file.read().decode("utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise DataError("not UTF-8 text", where=str(path)) from error
    return [id for line in lines if (id := line.strip())]
