"""Opening a data set: from the entry of a recipe to records, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nvembed.core.errors import SourceError
from nvembed.data.records import LabelRecord, PairRecord, Record, RowError, parse_record
from nvembed.data.sources.columns import Columns
from nvembed.data.sources.config import DatasetConfig, TableConfig
from nvembed.data.sources.files import open_file
from nvembed.data.sources.layouts import Convert, converter, needed_columns
from nvembed.data.sources.rows import BadRow, Converted, OpenedDataset, Rows, Table, Values

# So many rows are looked at before a source of which none could be used is given up.
_FIRST_ROWS = 1000


def open_dataset(config: DatasetConfig, *, base_dir: Path) -> OpenedDataset:
    """Open the source of a data set and look whether it has the expected form.

    ``max_records`` is not applied: what is done with the records in between decides which are used.

    Args:
        config: the data set.
        base_dir: folder that relative paths start at.

    Raises:
        SourceError: the source is not there, cannot be reached, may not be read, or has other
            columns than expected; says which, what was found and what to do.
    """
    opened = OpenedDataset(revision=None, rows=iter(()))
    table = open_table(config.table, base_dir=base_dir)
    opened.revision = table.revision
    columns = Columns(config.columns)
    columns.check(table, (*needed_columns(config), *config.where))
    convert = converter(config, columns, textual=table.textual)
    rows = _chosen(opened.counting(table.rows), config.where, columns)
    opened.rows = _hopeless(_converted(rows, convert, config), table)
    return opened


def open_table(config: TableConfig, *, base_dir: Path) -> Table:
    """Open one table.

    Raises:
        SourceError: see ``open_dataset``.
    """
    if config.path is not None:
        return open_file(base_dir / config.path, header=config.header, quotes=config.quotes)
    raise SourceError("sets on the hub cannot be read yet", where=str(config.hub))


def _chosen(rows: Rows, where: dict[str, tuple[str, ...]], columns: Columns) -> Rows:
    """Leave out the rows that ``where`` leaves out."""
    if not where:
        yield from rows
        return
    for row in rows:
        if isinstance(row, BadRow):
            yield row
            continue
        try:
            found = {name: columns.need(row.values, name) for name in where}
        except RowError as bad:
            yield BadRow(row.place, str(bad))
            continue
        if all(str(found[name]) in allowed for name, allowed in where.items()):
            yield row


def _converted(rows: Rows, convert: Convert, config: DatasetConfig) -> Iterator[Converted | BadRow]:
    for row in rows:
        if isinstance(row, BadRow):
            yield row
            continue
        try:
            for values in convert(row.values):
                yield record_or_problem(values, row.place, config)
        except RowError as bad:
            yield BadRow(row.place, str(bad))


def record_or_problem(values: Values, place: str, config: DatasetConfig) -> Converted | BadRow:
    """Check the object of a record, and its length."""
    try:
        record = parse_record(values, config.kind)
    except RowError as bad:
        return BadRow(place, str(bad))
    longest = max(map(len, _texts(record)))
    if longest > config.max_characters:
        return BadRow(
            place,
            f"a text of {longest:,} characters, expected at most {config.max_characters:,} "
            "(max_characters)",
        )
    return Converted(record, place)


def _texts(record: Record) -> tuple[str, ...]:
    if isinstance(record, PairRecord):
        return (record.query, *record.positives, *record.negatives)
    if isinstance(record, LabelRecord):
        return (record.text, record.label)
    return (record.sentence1, record.sentence2, *record.negatives)


def _hopeless(rows: Iterator[Converted | BadRow], table: Table) -> Iterator[Converted | BadRow]:
    """Give a source up whose first rows are all bad for the same reason."""
    problems: list[BadRow] = []
    for row in rows:
        yield row
        if isinstance(row, Converted):
            yield from rows
            return
        problems.append(row)
        if len(problems) == _FIRST_ROWS and len({bad.problem for bad in problems}) == 1:
            raise SourceError(
                f"none of the first {_FIRST_ROWS:,} rows can be used: {problems[0].problem}",
                where=table.name,
                hint="Has the set another form than the recipe says? See `layout` and `columns`",
            )
