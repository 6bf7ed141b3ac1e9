"""The database: one Lance table of documents, their fields and their vectors.

Every change is one version of the table, so a process that is killed leaves the version before it.
Columns: ``id``, ``text``, ``text_hash``, ``vector`` ``(D,)`` of length 1, and a column per field,
of its Arrow type (``index/fields.py``).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import lancedb
import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout
from lancedb.index import FTS, BTree, IvfSq
from numpy.typing import NDArray

from nvembed.core.arguments import Precision
from nvembed.core.config import StrictModel
from nvembed.core.errors import ConfigError, DataError
from nvembed.core.files import os_errors
from nvembed.core.ownership import MARK, mark_growing, refuse_foreign
from nvembed.index.fields import (
    JSON,
    OWN_COLUMNS,
    column_name,
    field_name,
    to_column,
    to_json,
    type_of_column,
)
from nvembed.index.where import sql_type, where_sql

T = TypeVar("T")

TABLE = "documents"
_FOLDER = f"{TABLE}.lance"
LOCK = ".lock"
INDEX = "index"
ANN_ABOVE = 50_000  # documents; docs/results.md, "The index", has 100,000
_KEY = b"nvembed"
PASSAGE_ID = r"(?s)^.+#[0-9a-f]{12}(-[0-9]+)?$"  # in Python and in SQL
# Whole numbers up to here are floats as well.
_EXACT = 2**53
# Changes, of a window of documents each, after which ids are indexed anew: what no index covers is
# looked through at every later change, file by file.
_CHANGES = 64
# Old versions are kept for readers that are in the middle of one.
_KEPT = timedelta(minutes=10)
_PROBES, _REFINE = 20, 4  # the recall that they give: docs/results.md, "The index"


def is_database(path: str | Path) -> bool:
    """Whether ``nvembed index`` has made this folder, and came so far as to a first version."""
    return any((Path(path) / _FOLDER / "_versions").glob("*.manifest"))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Let no other process write to a database while the block runs; its folder is made."""
    ours = {LOCK, MARK, _FOLDER}
    if path.exists() and (not path.is_dir() or any(p.name not in ours for p in path.iterdir())):
        raise ConfigError("not empty, and no database", where=str(path), hint="Choose another")
    if not is_database(path):
        refuse_foreign(path / _FOLDER, INDEX)
    path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ConfigError(
            "another process is writing to the database", where=str(path), hint="Wait for it to end"
        ) from error
    try:
        yield
    finally:
        lock.release()


def text_hash(text: str) -> str:
    """Name a text by its content, 32 hexadecimal digits."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class DatabaseRecord(StrictModel):
    """How the vectors of a database were made."""

    layout: Literal[1] = 1  # version of the table's columns
    model: str | None  # folder (absolute) or hub id; None for an encoder that was handed over
    fingerprint: str | None  # of the model's files, see ``contents_fingerprint``
    dimension: int  # width of the vectors, possibly the first of a wider model
    task: str | None  # instruction of queries that bring none
    probe: tuple[tuple[float, ...], ...]  # vectors of test texts, see ``search.py``
    dtype: Precision | None = None  # of the weights, for all documents; None where not known
    passages: int | None = None  # most tokens of a passage; None leaves documents whole
    rows_cut: bool = False  # and not files alone
    long: Literal["cut", "late"] = "cut"  # late: passages are pooled from the whole document


class Database:
    """An open database; see ``create`` and ``open``."""

    def __init__(self, path: Path, table: Any, record: DatabaseRecord) -> None:
        self.path = path
        self.record = record
        self._table = table
        self._changes = 0

    @classmethod
    def create(cls, path: Path, record: DatabaseRecord) -> Database:
        """Make an empty database; within ``writing`` only."""
        # A process may have been killed before the first version was there.
        shutil.rmtree(path / _FOLDER, ignore_errors=True)
        with os_errors("cannot write", path / _FOLDER):
            mark_growing(path / _FOLDER, INDEX)
        types = (*[pa.string()] * 3, pa.list_(pa.float32(), record.dimension))
        columns = zip(OWN_COLUMNS, types, strict=True)
        schema = pa.schema([pa.field(name, type, nullable=False) for name, type in columns])
        metadata = {_KEY: record.model_dump_json().encode()}
        _connect(path).create_table(TABLE, schema=schema.with_metadata(metadata))
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> Database:
        """Open a database, always at its newest version."""
        if not is_database(path):
            raise DataError(
                "no database", where=str(path), hint="nvembed index DOCS --to DB makes one"
            )
        try:
            table = _connect(path).open_table(TABLE)
            record = DatabaseRecord.model_validate_json((table.schema.metadata or {})[_KEY])
        except (KeyError, ValueError, RuntimeError, OSError) as error:
            reason = str(error).strip().splitlines()
            raise DataError(
                f"cannot be opened as a database of nvembed ({reason[0] if reason else error!r})",
                where=str(path),
            ) from error
        return cls(path, table, record)

    @property
    def fields(self) -> dict[str, pa.DataType]:
        """The fields of the documents and their types."""
        return {name: type_of_column(column) for name, column in self._columns().items()}

    @property
    def filterable(self) -> dict[str, pa.DataType]:
        """What a filter may name: the fields, ``id`` and ``text``."""
        return {"id": pa.string(), "text": pa.string(), **self.fields}

    def _columns(self, schema: pa.Schema | None = None) -> dict[str, pa.Field]:
        """The column of each field, now or of a schema: of several generations the last."""
        found: dict[str, tuple[int, pa.Field]] = {}
        for column in self._table.schema if schema is None else schema:
            if column.name not in OWN_COLUMNS and column.name[0] != "_":  # a score of the engine
                name, generation = field_name(column.name)
                if name not in found or found[name][0] < generation:
                    found[name] = (generation, column)
        return {name: column for name, (_, column) in found.items()}

    def add_fields(self, fields: dict[str, pa.DataType]) -> None:
        """Give all documents new fields, empty so far."""
        if not fields:
            return
        try:
            self._table.add_columns(pa.schema([to_column(n, type) for n, type in fields.items()]))
        except (RuntimeError, ValueError, OSError) as error:
            shown = ", ".join(f"{name} ({type})" for name, type in fields.items())
            raise DataError(
                f"fields cannot be added ({str(error).splitlines()[0][:120]}): {shown}",
                where=str(self.path),
                hint="--fields names those to keep",
            ) from error

    def widen(self, name: str, type: pa.DataType) -> None:
        """Give a field a type with more room, in one version of the table."""
        old = self._columns()[name]
        if pa.types.is_floating(type) and old.type in (pa.int64(), pa.uint64()):
            below = f" OR `{old.name}` < -{_EXACT}" if old.type == pa.int64() else ""
            if self._table.count_rows(f"`{old.name}` > {_EXACT}{below}"):
                raise DataError(
                    f'"{name}" holds whole numbers beyond 2^53, and now fractions',
                    where=str(self.path),
                    expected="numbers that 64 bits hold together, or texts",
                )
        new = column_name(name, field_name(old.name)[1] + 1)
        self._table.add_columns({new: f"arrow_cast(`{old.name}`, '{sql_type(type)}')"})
        self._drop_former()

    def _drop_former(self) -> None:
        """Drop columns that stand for nothing any more, also of a process that was killed."""
        current = {column.name for column in self._columns().values()}
        former = [n for n in self._table.schema.names if n not in current and n not in OWN_COLUMNS]
        if former:
            self._table.drop_columns(former)

    def upsert(
        self,
        ids: Sequence[str],
        texts: Sequence[str],
        fields: Sequence[Mapping[str, Any]],
        vectors: NDArray[np.float32],
        keys: Sequence[str] | None = None,
    ) -> None:
        """Write documents ``(N,)`` with vectors ``(N, D)``; those with a known id are replaced.

        Ids must be distinct, and of fields only known ones may be given. ``keys`` name what the
        vectors were made of, where that is more than the texts.
        """
        columns: dict[str, Any] = {
            "id": ids,
            "text": texts,
            "text_hash": keys or [text_hash(text) for text in texts],
            "vector": pa.FixedSizeListArray.from_arrays(
                pa.array(vectors.astype(np.float32).ravel()), self.record.dimension
            ),
        }
        self._drop_former()
        for name, column in self._columns().items():
            values = [row.get(name) for row in fields]
            if type_of_column(column) == JSON:
                values = [None if value is None else to_json(value) for value in values]
            columns[column.name] = pa.array(values, column.type)
        rows = pa.table(columns, schema=self._table.schema)
        merge = self._table.merge_insert("id")
        merge.when_matched_update_all().when_not_matched_insert_all().execute(rows)
        self._changes += 1
        if self._changes % _CHANGES == 0:
            for column in ("id", "text_hash"):
                self._table.create_index(column, config=BTree(), replace=True)

    def delete(self, ids: Sequence[str]) -> int:
        """Delete documents; unknown ids are passed over. Returns how many were there."""
        before = self.count()
        for start in range(0, len(ids), 1000):
            self._table.delete(_is_in("id", ids[start : start + 1000]))
        return before - self.count()

    def count(self, where: str | None = None) -> int:
        """Number of documents, of those that a filter lets through."""
        return self._read(lambda: int(self._table.count_rows(self._sql(where))))

    def get(self, column: str, values: Sequence[str]) -> list[dict[str, Any]]:
        """Documents by ``id`` or ``text_hash``, in no order, with ``vector`` and ``fields``."""
        parts = (values[start : start + 1000] for start in range(0, len(values), 1000))
        queries = (self._table.search().where(_is_in(column, part)) for part in parts)
        return [row for query in queries for row in self._rows(query)]

    def passages(
        self, field: str, values: Sequence[str], *, begins: bool = False
    ) -> dict[str, str]:
        """Ids of passages by a text of theirs that is one of the values, or begins with one."""
        columns = self._columns()
        column = "id" if field == "id" else columns[field].name if field in columns else None
        if column is None or "start" not in columns:
            return {}
        names: dict[str, str] = {}
        for first in range(0, len(values), 100):  # a chain of OR is as deep as it is long
            part = values[first : first + 100]
            test = _is_in(column, part)
            if begins:
                test = " OR ".join(f"starts_with(`{column}`, {_quoted(value)})" for value in part)
            query = self._table.search().where(f"`start` IS NOT NULL AND ({test})")
            found = query.select(sorted({"id", column})).to_arrow()
            names |= zip(found["id"].to_pylist(), found[column].to_pylist(), strict=True)
        return names

    @property
    def unit(self) -> Literal["document", "passage"]:
        """What a row is called: a passage, where there is one."""
        if self.record.passages is None or "start" not in self._columns():
            return "document"
        test = f"`start` IS NOT NULL AND regexp_like(id, '{PASSAGE_ID}')"
        return "passage" if self._table.search().where(test).limit(1).to_list() else "document"

    def _rows(self, query: Any) -> list[dict[str, Any]]:
        """What a query finds: rows with their vectors as arrays, their fields by name."""
        found: pa.Table = query.to_arrow()
        flat = found["vector"].combine_chunks().flatten().to_numpy()
        vectors = flat.reshape(found.num_rows, -1) if found.num_rows else []
        fields: dict[str, list[Any]] = {}
        for name, column in self._columns(found.schema).items():  # others may be there by now
            fields[name] = found[column.name].to_pylist()
            if type_of_column(column) == JSON:
                fields[name] = [None if v is None else json.loads(v) for v in fields[name]]
        kept = [n for n in found.column_names if n in ("id", "text", "text_hash", "_score")]
        rows = found.select(kept).to_pylist()
        for number, (row, vector) in enumerate(zip(rows, vectors, strict=True)):
            row["vector"] = vector
            row["fields"] = {n: v[number] for n, v in fields.items() if v[number] is not None}
        return rows

    def tidy(self, ann_above: int = ANN_ABOVE) -> None:
        """Make what searches need: indexes of ids, words and, above ``ann_above``, of vectors."""
        indexed = self._indexes()
        for column, config in (("id", BTree()), ("text_hash", BTree()), ("text", FTS())):
            if column not in indexed:
                self._table.create_index(column, config=config)
        many = self.count() > ann_above
        if many and "vector" not in indexed:
            self._table.create_index("vector", config=IvfSq(distance_type="cosine"))
        elif not many and "vector" in indexed:
            self._table.drop_index(indexed["vector"])
        # What a killed process has left goes too: nobody else writes now.
        self._table.optimize(cleanup_older_than=_KEPT, delete_unverified=True)

    def _indexes(self) -> dict[str, str]:
        """The names of the indexes by their column."""
        return {index.columns[0]: index.name for index in self._table.list_indices()}

    @property
    def approximate(self) -> bool:
        """Whether neighbours are found through an index."""
        return "vector" in self._indexes()

    @property
    def has_words(self) -> bool:
        """Whether words are indexed."""
        return "text" in self._indexes()

    def check_words(self) -> None:
        """Refuse a search by words where these are not indexed."""
        if not self.has_words:
            hint = "A run of nvembed index did not come to its end: run it again"
            raise DataError("words are not indexed", where=str(self.path), hint=hint)

    def nearest(
        self, vector: NDArray[np.float32], count: int, *, where: str | None, exact: bool
    ) -> list[dict[str, Any]]:
        """Documents nearest to a unit vector ``(D,)``, nearest first, as in ``get``."""

        def read() -> list[dict[str, Any]]:
            query = self._table.search(vector, vector_column_name="vector").distance_type("cosine")
            if exact or not self.approximate:
                query = query.bypass_vector_index()
            else:
                # Candidates by 8-bit numbers, put in order by the vectors themselves.
                query = query.nprobes(_PROBES).refine_factor(_REFINE)
            return self._rows(self._filtered(query.limit(count), where))

        return self._read(read)

    def by_words(self, text: str, count: int, *, where: str | None) -> list[dict[str, Any]]:
        """Documents by BM25 (``_score``), best first, equal ones by id."""
        self.check_words()

        def read() -> list[dict[str, Any]]:
            query = self._table.search(text, query_type="fts", fts_columns="text").limit(count)
            return self._rows(self._filtered(query, where))

        return sorted(self._read(read), key=lambda row: (-row["_score"], row["id"]))

    def _read(self, read: Callable[[], T]) -> T:
        """Read, and again where columns have changed meanwhile: a filter names those of before."""
        while True:
            schema = self._table.schema
            try:
                return read()
            except (RuntimeError, ValueError):
                if self._table.schema == schema:
                    raise

    def _filtered(self, query: Any, where: str | None) -> Any:
        return query if where is None else query.where(self._sql(where), prefilter=True)

    def _sql(self, where: str | None) -> str | None:
        if where is None:
            return None
        columns = {name: column.name for name, column in self._columns().items()}
        return where_sql(where, self.filterable, columns)


def _connect(path: Path) -> Any:
    return lancedb.connect(os.fspath(path), read_consistency_interval=timedelta(0))


def _is_in(column: str, values: Sequence[str]) -> str:
    return f"`{column}` IN ({', '.join(map(_quoted, values))})"


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
