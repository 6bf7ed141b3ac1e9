"""All records of a data set in memory, as training and mining take them.

Next file: ``data/examples.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nvembed.core.errors import DataError, SourceError
from nvembed.core.files import ending_of, numbered_lines, open_text_file, parse_json, too_long
from nvembed.core.reporting import ProblemCounts
from nvembed.data.build_config import BuildConfig
from nvembed.data.built_sets import built_problem
from nvembed.data.config import DatasetConfig
from nvembed.data.records import (
    EXPECTED,
    LABEL_HINTS,
    LABEL_KINDS,
    BadRow,
    Conversion,
    Kind,
    RowError,
    label_problems,
    parse_line,
    parse_record,
)
from nvembed.data.sources.files import parquet_rows, shard_files
from nvembed.data.sources.opening import open_dataset

_log = logging.getLogger(__name__)

_MAX_SHOWN = 5
_PLAIN = (".jsonl", ".jsonl.gz", ".parquet")


def read_records(path: str | Path, kind: Kind, *, conversion: Conversion = "example") -> list[Any]:
    """Read all records of a file of plain records, or say everything that is wrong with it.

    ``path`` is ``.jsonl``, ``.jsonl.gz``, ``.parquet`` (rows count as lines, from 1), or the folder
    of a built set. ``conversion`` is what classes will be turned into: a class with a single text
    gives no positive by example, a class called "7" says nothing as a label text.

    Raises:
        DataError: the file is missing, unreadable or empty; or naming up to five kinds of bad lines
            and the number of those beyond.
    """
    empty = DataError("the file holds no records", where=str(path), expected=EXPECTED[kind])
    return _all_of(_plain_rows(Path(path), kind), kind, conversion, empty)


def load_records(config: DatasetConfig, *, base_dir: Path) -> list[Any]:
    """Read all records of a set, or say everything that is wrong with it; see ``read_records``.

    A set on the hub is refused: it has to be built first.
    """
    if config.path is None:
        raise SourceError(
            "the set is on the hub and was not built yet",
            where=config.name,
            hint="Run `nvembed data build` with the recipe first",
        )
    path, kind = base_dir / config.path, config.kind
    plain = config.with_file(Path(config.path)).model_copy(
        update={"path": config.path, "max_characters": config.max_characters}
    )
    if plain == config and (config.path.endswith(_PLAIN) or shard_files(path)):
        return read_records(path, kind, conversion=config.conversion)  # quicker
    rows = open_dataset(config, base_dir=base_dir).rows
    empty = DataError("the set holds no records", where=str(path), expected=EXPECTED[kind])
    return _all_of(rows, kind, config.conversion, empty, config)


def training_datasets(
    datasets: Sequence[DatasetConfig], build: BuildConfig | None, base_dir: Path
) -> tuple[DatasetConfig, ...]:
    """The data sets of a run, each with its built shards in place of its source.

    Without a ``build`` section they come back as they are. Settings are compared with those of the
    recipe and contents are not: ``nvembed data build`` does that.

    Raises:
        DataError: a set is not built, or was built from other settings; names all of them. Or sets
            are on the hub and the recipe does not build any.
    """
    if build is None:
        if away := [dataset.name for dataset in datasets if dataset.path is None]:
            told = f"{', '.join(away)}: on the hub, and the recipe has no `build` section"
            hint = "Add one, as in `build: {folder: data}`, and run `nvembed data build RECIPE`"
            raise DataError(told, where="datasets", hint=hint)
        return tuple(datasets)
    folder = (base_dir / build.folder).absolute()
    problems = (built_problem(dataset, build, folder) for dataset in datasets)
    if told := "; ".join(filter(None, problems)):
        raise DataError(
            told,
            where=str(folder),
            expected="the data sets of the recipe",
            hint="Run `nvembed data build RECIPE`, with the same key=value changes",
        )
    return tuple(dataset.with_file(folder / dataset.name) for dataset in datasets)


def _plain_rows(path: Path, kind: Kind) -> Iterator[tuple[Any, ...] | BadRow]:
    """Yield (record, place) of each good row, without ``Converted``, which takes its time."""
    name = str(path)
    if ending_of(path) == ".parquet" or path.is_dir():
        for number, row in parquet_rows(path):
            yield _checked(row, kind, f"{name}:{number}")
        return
    with open_text_file(path) as file:
        for number, line in numbered_lines(file):
            place = f"{name}:{number}"
            if line is None:
                raise DataError(too_long(), where=place)
            if (record := parse_line(line, kind)) is not None:
                yield record, place
            elif line.strip():
                value = parse_json(line, place)
                if not isinstance(value, dict):
                    message = f"a line holds {type(value).__name__}"
                    raise DataError(message, where=place, expected="one JSON object per line")
                yield _checked(value, kind, place)


def _checked(row: dict[str, Any], kind: Kind, place: str) -> tuple[Any, str] | BadRow:
    try:
        return parse_record(row, kind), place
    except RowError as bad:
        return BadRow(place, str(bad))


def _all_of(
    rows: Iterable[tuple[Any, ...] | BadRow],
    kind: Kind,
    conversion: Conversion,
    empty: DataError,
    config: DatasetConfig | None = None,
) -> list[Any]:
    """The records of all rows, or one error for everything that is wrong; ``empty`` for none."""
    records: list[Any] = []
    places: list[str] = []
    problems, passed_over, stopped = ProblemCounts(), ProblemCounts(), ""
    try:
        for row in rows:
            if isinstance(row, BadRow):
                (passed_over if row.harmless else problems).add(row.place, row.problem)
            else:
                records.append(row[0])
                places.append(row[1])
    except DataError as error:
        if not problems.count:
            raise
        stopped = f"; then reading stopped ({error})"  # the rows before were bad as well
    expected, hint = EXPECTED[kind] if not config or config.layout == "records" else None, None
    if not problems.count and kind in LABEL_KINDS and records:
        found = label_problems(records, conversion)
        problems = ProblemCounts(((places[index], text) for index, text in found), by_value=True)
        expected, hint = None, LABEL_HINTS[conversion]
    if problems.count:
        message = problems.summary(_MAX_SHOWN) + stopped
        raise DataError(message, where=problems.kinds[0].place, expected=expected, hint=hint)
    if config and passed_over.count:
        place, told = passed_over.kinds[0].place, passed_over.summary(_MAX_SHOWN)
        _log.warning("%s: left out: %s: %s", config.name, place, told)
    if not records:
        raise empty
    return records
