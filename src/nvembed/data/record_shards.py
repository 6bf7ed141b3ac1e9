"""Records in Parquet files of a fixed number of rows: ``part-00000.parquet``, ``part-00001…``.

The same records give the same bytes: no times, no random names, row groups that end at fixed
places. Needs pyarrow.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nvembed.data.record_files import shard_files
from nvembed.data.records import Kind, LabelRecord, PairRecord, Record, StsRecord
from nvembed.data.sources import Converted

# A row group ends at whichever comes first, so that gigantic texts do not fill the memory.
GROUP_ROWS = 8192
GROUP_CHARACTERS = 32_000_000
READ_ROWS = 1024


class Rows(Protocol):
    """A sequence of records that can be walked several times."""

    def __call__(self) -> Iterator[Converted]:
        """Start at the first record."""
        ...


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a set: its name, its rows, its size in bytes and its checksum."""

    file: str
    rows: int
    bytes: int
    sha256: str


def write_shards(
    folder: Path,
    rows: Iterable[Converted],
    kind: Kind,
    *,
    rows_per_shard: int,
    places: bool = False,
) -> list[Shard]:
    """Write records into a folder of their own.

    Args:
        folder: exists and holds no shards.
        rows: the records, all of one kind.
        kind: of the records; decides the columns.
        rows_per_shard: rows of every file but the last.
        places: write where each record came from as well.

    Returns:
        The files, in order; none where there are no records.
    """
    writer = _Writer(folder, kind, rows_per_shard, places=places)
    for row in rows:
        writer.add(row)
    writer.close()
    return writer.shards


def read_shards(folder: Path, kind: Kind) -> Iterator[Converted]:
    """Read what ``write_shards`` wrote; the records are trusted, not checked again."""
    import pyarrow.parquet

    for path in shard_files(folder):
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=READ_ROWS, use_threads=False):
                for row in batch.to_pylist():
                    yield Converted(record_of(row, kind), row.get("place") or "")


def record_of(row: dict[str, Any], kind: Kind) -> Record:
    """Make the record of a row that was written from one."""
    match kind:
        case "retrieval" | "nli":
            return PairRecord(
                row["query"],
                tuple(row["positive"]),
                tuple(row.get("negative") or ()),
                tuple(row.get("positive_scores") or ()),
                tuple(row.get("negative_scores") or ()),
                row.get("instruction"),
            )
        case "sts":
            return StsRecord(
                row["sentence1"],
                row["sentence2"],
                row["score"],
                tuple(row.get("negative") or ()),
            )
        case "classification" | "clustering":
            return LabelRecord(row["text"], row["label"])


def texts_of(record: Record) -> tuple[str, ...]:
    """All texts of a record, negatives included."""
    if isinstance(record, PairRecord):
        return (record.query, *record.positives, *record.negatives)
    if isinstance(record, StsRecord):
        return (record.sentence1, record.sentence2, *record.negatives)
    return (record.text,)


class _Writer:
    """Rows of the group at hand, and the file that it goes to."""

    def __init__(self, folder: Path, kind: Kind, rows_per_shard: int, *, places: bool) -> None:
        self.shards: list[Shard] = []
        self._folder = folder
        self._schema = _schema(kind, places=places)
        self._names = set(self._schema.names)
        self._places = places
        self._rows_per_shard = rows_per_shard
        self._group: list[dict[str, Any]] = []
        self._characters = 0
        self._rows = 0  # of the open file, those of the group included
        self._raw: Any = None
        self._file: Any = None

    def add(self, row: Converted) -> None:
        values = row.record.to_json()
        if self._places:
            values["place"] = row.place
        assert values.keys() <= self._names  # pyarrow would leave the others out without a word
        self._group.append(values)
        self._characters += sum(map(len, texts_of(row.record)))
        self._rows += 1
        if self._rows == self._rows_per_shard:
            self._end_file()
        elif len(self._group) == GROUP_ROWS or self._characters >= GROUP_CHARACTERS:
            self._end_group()

    def close(self) -> None:
        """Write what is left."""
        if self._rows:
            self._end_file()

    def _end_group(self) -> None:
        import pyarrow
        import pyarrow.parquet

        if self._file is None:
            # Opened here and not by name: an error of the disk then is Python's own.
            self._raw = open(self._path(), "wb")
            self._file = pyarrow.parquet.ParquetWriter(
                self._raw, self._schema, compression="zstd", write_page_index=False
            )
        batch = pyarrow.RecordBatch.from_pylist(self._group, schema=self._schema)
        self._file.write_batch(batch)
        self._group = []
        self._characters = 0

    def _end_file(self) -> None:
        self._end_group()
        self._file.close()
        self._raw.close()
        path = self._path()
        with open(path, "rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
        self.shards.append(Shard(path.name, self._rows, path.stat().st_size, digest))
        self._file = self._raw = None
        self._rows = 0

    def _path(self) -> Path:
        return self._folder / f"part-{len(self.shards):05d}.parquet"


def _schema(kind: Kind, *, places: bool) -> Any:
    import pyarrow

    text, number = pyarrow.string(), pyarrow.float64()
    texts, numbers = pyarrow.list_(text), pyarrow.list_(number)
    match kind:
        case "retrieval" | "nli":
            columns = {
                "query": text,
                "positive": texts,
                "negative": texts,
                "positive_scores": numbers,
                "negative_scores": numbers,
                "instruction": text,
            }
        case "sts":
            columns = {"sentence1": text, "sentence2": text, "score": number, "negative": texts}
        case "classification" | "clustering":
            columns = {"text": text, "label": text}
    if places:
        columns["place"] = text
    return pyarrow.schema(list(columns.items()))
