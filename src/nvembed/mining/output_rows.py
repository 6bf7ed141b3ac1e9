"""The rows of a mined file: the records with negatives, and what their input holds beside them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nvembed.core.text_files import ending_of
from nvembed.data.config import DatasetConfig
from nvembed.data.records import REQUIRED, PairRecord, StsRecord
from nvembed.data.sources.opening import open_table
from nvembed.data.sources.rows import Row

_WRITTEN = ("negative", "positive_scores", "negative_scores")


def output_rows(
    source: DatasetConfig, mined: Iterable[PairRecord | StsRecord]
) -> Iterator[dict[str, Any]]:
    """The records with negatives, and beside them what else their rows hold.

    Only text files whose rows are records one by one have something to carry over. Columns that
    are called differently there get the names of records.
    """
    path = Path(source.path or "")
    if source.layout != "records" or path.is_dir() or ending_of(path) == ".parquet":
        yield from (record.to_json() for record in mined)
        return
    table = open_table(source.table, base_dir=Path())
    as_they_are = not (table.textual or source.columns)
    own = set(_WRITTEN)
    if not as_they_are:
        own |= {*REQUIRED[source.kind], "instruction"}
        own |= {name for name in source.columns.values() if isinstance(name, str)}
    for row, record in zip(table.rows, mined, strict=True):
        assert isinstance(row, Row), "files with bad rows were refused"
        new = record.to_json()
        if as_they_are and "positive_scores" not in new:
            new = {key: new[key] for key in ("negative",) if key in new}
        yield {key: value for key, value in row.values.items() if key not in own} | new
