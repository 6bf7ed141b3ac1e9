"""Files of records: rows with their line numbers, and one error for all bad lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from nvembed.core.errors import DataError
from nvembed.core.reporting import ProblemCounts
from nvembed.core.text_files import ending_of, read_jsonl

MAX_PROBLEMS_SHOWN = 5
_ROWS_AT_ONCE = 1024  # of Parquet: texts may be long


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) of a JSONL, JSONL.gz or Parquet file.

    The shards of a folder (``data/record_shards.py``) are one file, their rows counted on.

    Raises:
        DataError: the file cannot be read; see ``read_jsonl``.
    """
    if path.is_dir():
        shards = shard_files(path)
        if not shards:
            raise DataError(
                "no training file here", where=str(path), expected="part-00000.parquet and so on"
            )
        rows = (row for shard in shards for _, row in parquet_rows(shard))
        return enumerate(rows, start=1)
    return parquet_rows(path) if ending_of(path) == ".parquet" else read_jsonl(path)


def shard_files(folder: Path) -> list[Path]:
    """The Parquet files of a built set, in order."""
    return sorted(folder.glob("part-*.parquet"))


def parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row number from 1, object) of a Parquet file.

    Raises:
        DataError: the file or pyarrow is missing, or it is no Parquet file.
    """
    with open_parquet(path) as file:
        number = 0
        try:
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
        except (ValueError, OSError) as error:  # errors of pyarrow are one or the other
            reason = str(error).splitlines()[0]
            raise DataError(f"not a readable Parquet file ({reason})", where=str(path)) from error


def open_parquet(path: Path) -> Any:
    """Open a Parquet file: a ``pyarrow.parquet.ParquetFile``.

    Raises:
        DataError: the file or pyarrow is missing, or it is no Parquet file.
    """
    if not path.is_file():
        raise DataError("no such file", where=str(path), expected="a Parquet file")
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            "reading Parquet needs pyarrow",
            where=str(path),
            hint="Run `pip install pyarrow`, or convert the file to JSONL",
        ) from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"not a readable Parquet file ({reason})", where=str(path)) from error


def refuse_rows(
    problems: ProblemCounts,
    stopped: DataError | None = None,
    *,
    expected: str | None = None,
    hint: str | None = None,
) -> NoReturn:
    """Raise one error for all bad rows of a file.

    Args:
        problems: what is wrong with them; at least one.
        stopped: why reading ended before the end of the file, if it did.
        expected: what a good row looks like.
        hint: what to do about it.
    """
    message = problems.summary(MAX_PROBLEMS_SHOWN)
    if stopped is not None:
        message += f"; then reading stopped ({stopped})"
    raise DataError(message, where=problems.kinds[0].place, expected=expected, hint=hint)
