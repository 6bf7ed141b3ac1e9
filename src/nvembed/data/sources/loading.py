"""All records of a data set in memory, as training takes them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from nvembed.core.errors import DataError, SourceError
from nvembed.core.reporting import ProblemCounts
from nvembed.data.record_files import MAX_PROBLEMS_SHOWN, refuse_rows, shard_files
from nvembed.data.records import EXPECTED, LABEL_HINTS, Records, label_problems, read_records
from nvembed.data.sources.config import LABEL_KINDS, DatasetConfig
from nvembed.data.sources.opening import open_dataset
from nvembed.data.sources.rows import BadRow

_log = logging.getLogger(__name__)

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
    problems, passed_over = ProblemCounts(), ProblemCounts()
    for row in open_dataset(config, base_dir=base_dir).rows:
        if isinstance(row, BadRow):
            (passed_over if row.harmless else problems).add(row.place, row.problem)
        else:
            records.append(row.record)
            places.append(row.place)
    if problems.count:
        expected = EXPECTED[config.kind] if config.layout == "records" else None
        refuse_rows(problems, expected=expected)
    if passed_over.count:
        place, told = passed_over.kinds[0].place, passed_over.summary(MAX_PROBLEMS_SHOWN)
        _log.warning("%s: left out: %s: %s", config.name, place, told)
    if not records:
        where = str(base_dir / config.path)
        raise DataError("the set holds no records", where=where, expected=EXPECTED[config.kind])
    if config.kind in LABEL_KINDS:
        found = label_problems(records, config.conversion)
        if found:
            named = ((places[index], problem) for index, problem in found)
            refuse_rows(ProblemCounts(named, by_value=True), hint=LABEL_HINTS[config.conversion])
    return records


def _is_plain(config: DatasetConfig, base_dir: Path) -> bool:
    """Whether ``data/records.py`` reads the file, or the built set, as it is, which is quicker."""
    source = config.with_file(Path(config.path or "")).model_copy(
        update={"path": config.path, "max_characters": config.max_characters}
    )
    path = str(config.path)
    return source == config and (path.endswith(_PLAIN) or bool(shard_files(base_dir / path)))
