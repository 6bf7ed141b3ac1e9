"""All records of a data set in memory, as training takes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from nvembed.core.errors import DataError, SourceError
from nvembed.data.record_files import MAX_PROBLEMS_SHOWN, shard_files
from nvembed.data.records import EXPECTED, LABEL_HINTS, Records, label_problems, read_records
from nvembed.data.sources.config import LABEL_KINDS, DatasetConfig
from nvembed.data.sources.opening import open_dataset
from nvembed.data.sources.rows import BadRow

_PLAIN = (".jsonl", ".jsonl.gz", ".parquet")


def load_records(config: DatasetConfig, *, base_dir: Path) -> Records:
    """Read all records of a set, or say everything that is wrong with it.

    Args:
        config: the data set.
        base_dir: folder that relative paths start at.

    Returns:
        A list of records of the kind of the set.

    Raises:
        DataError: no file, no record, or bad rows: up to five of them, and the number of those
            beyond. A set on the hub is refused: it has to be built first.
    """
    if config.path is None:
        raise SourceError(
            "the set is on the hub and was not built yet",
            where=config.name,
            hint="Run `nvembed data build` with the recipe first",
        )
    if _is_plain(config, base_dir):
        return read_records(base_dir / config.path, config.kind, conversion=config.conversion)
    records: list[Any] = []
    places: list[str] = []
    problems: list[BadRow] = []
    for row in open_dataset(config, base_dir=base_dir).rows:
        if isinstance(row, BadRow):
            problems.append(row)
        else:
            records.append(row.record)
            places.append(row.place)
    if problems:
        _refuse(problems, expected=EXPECTED[config.kind] if config.layout == "records" else None)
    if not records:
        where = str(base_dir / config.path)
        raise DataError("the set holds no records", where=where, expected=EXPECTED[config.kind])
    if config.kind in LABEL_KINDS:
        found = label_problems(records, config.conversion)
        if found:
            bad = [BadRow(places[index], problem) for index, problem in found]
            _refuse(bad, hint=LABEL_HINTS[config.conversion])
    return records


def _is_plain(config: DatasetConfig, base_dir: Path) -> bool:
    """Whether ``data/records.py`` reads the file, or the built set, as it is, which is quicker."""
    source = config.with_file(Path(config.path or "")).model_copy(
        update={"path": config.path, "max_characters": config.max_characters}
    )
    path = str(config.path)
    return source == config and (path.endswith(_PLAIN) or bool(shard_files(base_dir / path)))


def _refuse(
    problems: Sequence[BadRow], *, expected: str | None = None, hint: str | None = None
) -> NoReturn:
    first, *others = problems[:MAX_PROBLEMS_SHOWN]
    message = first.problem + "".join(f"; {bad.place}: {bad.problem}" for bad in others)
    beyond = len(problems) - MAX_PROBLEMS_SHOWN
    if beyond > 0:
        message += f"; and {beyond} more bad row{'s' if beyond > 1 else ''}"
    raise DataError(message, where=first.place, expected=expected, hint=hint)
