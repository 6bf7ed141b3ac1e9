"""Opening a data set: from the entry of a recipe to records, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from nvembed.core.errors import DataError, SourceError
from nvembed.data.config import FORMS, DatasetConfig, TableConfig
from nvembed.data.records import (
    BadRow,
    Converted,
    LabelRecord,
    PairRecord,
    RowError,
    parse_record,
    texts_of,
)
from nvembed.data.sources import beir
from nvembed.data.sources.files import open_file
from nvembed.data.sources.hub import open_hub
from nvembed.data.sources.layouts import Source, record_values
from nvembed.data.sources.rows import (
    Columns,
    Keyed,
    OpenedDataset,
    Row,
    Rows,
    Table,
    Values,
    each_row,
    read_id,
)

# So many rows are looked at before a source of which none could be used is given up.
_FIRST_ROWS = 1000


def open_dataset(config: DatasetConfig, *, base_dir: Path, give_up: bool = True) -> OpenedDataset:
    """Open the source of a data set and look whether it has the expected form.

    ``max_records`` is not applied: what is done with the records in between decides which are used.
    With ``give_up``, an error is raised where the first thousand rows are bad for the same reason.

    Raises:
        SourceError: the source is not there, cannot be reached, may not be read, or has other
            columns than expected; says which, what was found and what to do.
    """
    with _as_source_errors():
        table = _own_table(config, base_dir)
        columns = Columns(config.columns)
        columns.check(table, (*config.needed_columns, *config.where))
        names = FORMS[config.layout].tables
        tables = {name: _keyed(config, name, table, base_dir) for name in names}
    opened = OpenedDataset(table.revision, iter(()))
    opened.rows = _read(opened, Source(config, columns, table.textual, tables), table, give_up)
    return opened


@contextmanager
def _as_source_errors() -> Iterator[None]:
    """Errors of files are those of a source here."""
    try:
        yield
    except SourceError:
        raise
    except DataError as error:
        raise SourceError(
            error.message, where=error.where, expected=error.expected, hint=error.hint
        ) from error


def _read(
    opened: OpenedDataset, source: Source, table: Table, give_up: bool
) -> Iterator[Converted | BadRow]:
    def counted() -> Rows:
        for row in table.rows:
            opened.rows_read += 1
            yield row

    told: list[str] = []
    with _as_source_errors():
        for row in record_values(_chosen(counted(), source), source):
            found = row if isinstance(row, BadRow) else _finished(*row, source.config)
            yield found
            if isinstance(found, Converted):
                give_up = False
            elif give_up:
                told.append(found.problem)
            if give_up and len(told) == _FIRST_ROWS and len(set(told)) == 1:
                message = f"none of the first {_FIRST_ROWS:,} rows can be used: {told[0]}"
                hint = "Has the set another form than the recipe says? See `layout` and `columns`"
                raise SourceError(message, where=table.name, hint=hint)


def open_table(config: TableConfig, *, base_dir: Path) -> Table:
    """Open one table: a file, or a set on the hub."""
    if config.path is not None:
        return open_file(base_dir / config.path, header=config.header, quotes=config.quotes)
    assert config.hub is not None
    return open_hub(config, config.hub, base_dir)


def _own_table(config: DatasetConfig, base_dir: Path) -> Table:
    """Open the table of the set itself; of a BEIR folder its judgements."""
    if config.path is None:
        return open_table(config.table, base_dir=base_dir)
    path = base_dir / config.path
    if path.is_dir():
        if config.layout != "beir":
            hint = "Is it in BEIR's layout? Then say `layout: beir`"
            raise SourceError("a folder, not a file", where=str(path), hint=hint)
        found = beir.find_judgements(path, config.split)
        if found is None:
            splits = ", ".join(beir.judged_splits(path))
            raise SourceError(
                "no such file",
                where=str(path / "qrels" / f"{config.split}.tsv"),
                expected=f"one of the splits there: {splits}" if splits else None,
                hint="Say which in `split`, or give its file" if splits else None,
            )
        path = found
    if config.layout == "beir" and config.header is None and config.quotes is None:
        return beir.open_judgements(path)
    return open_file(path, header=config.header, quotes=config.quotes)


def _keyed(config: DatasetConfig, name: str, own: Table, base_dir: Path) -> Keyed:
    """Open the table of documents or of queries, where the layout has it unless it is given.

    Tables of one repository are read at one commit, that of the ``own`` table of the set.
    """
    table = getattr(config, name) or _usual_table(config, name, base_dir)
    if config.hub and table.hub and table.hub.id == config.hub.id and not table.hub.revision:
        at = table.hub.model_copy(update={"revision": own.revision})
        table = table.model_copy(update={"hub": at})
    keyed = Keyed(open_table(table, base_dir=base_dir), Columns(table.columns))
    if config.layout == "scored":
        one = "document" if name == "corpus" else "query"
        keyed = replace(keyed, ids=(f"{one}_id",), texts=(one,))
    if config.layout == "beir":
        keyed = replace(keyed, spell=read_id)
    keyed.check()
    return keyed


def _usual_table(config: DatasetConfig, name: str, base_dir: Path) -> TableConfig:
    if config.hub is not None:
        changes: dict[str, object] = {"config": name, "split": name}
        if config.layout == "scored":  # one split per set, in three configurations
            changes = {"config": "documents" if name == "corpus" else name}
        changes |= {"take": None, "files": None}
        return TableConfig(hub=config.hub.model_copy(update=changes))
    folder = base_dir / (config.path or "")
    if config.layout == "beir" and folder.is_file() and folder.parent.name == "qrels":
        folder = folder.parent.parent
    if not folder.is_dir():
        hint = f"Add `{name}: {{path: …}}`, or give the folder of a set in BEIR's layout"
        told = f"the file of judgements is given, but not its {name}"
        raise SourceError(told, where=str(folder), hint=hint)
    found = beir.find_rows(folder, name)
    if found is None:
        raise SourceError(f"no {name} in the folder", where=str(folder), expected=f"{name}.jsonl")
    return TableConfig(path=str(found.absolute()))


def _chosen(rows: Rows, source: Source) -> Rows:
    """Leave out the rows that ``where`` leaves out."""
    where = source.config.where
    if not where:
        return rows

    def wanted(values: Values) -> list[Values]:
        found = {name: str(source.need(values, name)) for name in where}
        return [values] if all(found[name] in where[name] for name in where) else []

    kept = each_row(rows, wanted)
    return (row if isinstance(row, BadRow) else Row(*row) for row in kept)


def _finished(place: str, values: Values, config: DatasetConfig) -> Converted | BadRow:
    """Check the object of a record and cut it to the limits of the set."""
    try:
        record = parse_record(values, config.kind)
    except RowError as bad:
        return BadRow(place, str(bad))
    repeats = 0  # texts of lists that are not in the record a second time
    for side in ("positive", "negative"):
        if isinstance(given := values.get(side), list):
            repeats += len(given) - len(getattr(record, f"{side}s"))
    most, further = config.max_positives, config.max_negatives
    if isinstance(record, PairRecord) and (most, further) != (None, None):
        record = replace(
            record,
            positives=record.positives[:most],
            positive_scores=record.positive_scores[:most],
            negatives=record.negatives[:further],
            negative_scores=record.negative_scores[:further],
        )
    texts = texts_of(record)
    longest = max(map(len, (*texts, record.label) if isinstance(record, LabelRecord) else texts))
    if longest > config.max_characters:
        told = f"a text of {longest:,} characters, expected at most {config.max_characters:,}"
        return BadRow(place, f"{told} (max_characters)")
    return Converted(record, place, repeats)
