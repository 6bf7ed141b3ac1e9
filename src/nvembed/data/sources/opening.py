"""Opening a data set: from the entry of a recipe to records, row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from nvembed.core.errors import SourceError
from nvembed.data.records import LabelRecord, PairRecord, Record, RowError, parse_record
from nvembed.data.sources import beir, joins
from nvembed.data.sources.columns import Columns
from nvembed.data.sources.config import DatasetConfig, TableConfig
from nvembed.data.sources.files import open_file
from nvembed.data.sources.hub import open_hub
from nvembed.data.sources.joins import Joined, Keyed
from nvembed.data.sources.layouts import converter, needed_columns
from nvembed.data.sources.rows import BadRow, Converted, OpenedDataset, Rows, Table, Values

# So many rows are looked at before a source of which none could be used is given up.
_FIRST_ROWS = 1000

Join = Callable[[Rows], Iterator[Joined | BadRow]]


def open_dataset(config: DatasetConfig, *, base_dir: Path, give_up: bool = True) -> OpenedDataset:
    """Open the source of a data set and look whether it has the expected form.

    ``max_records`` is not applied: what is done with the records in between decides which are used.

    Args:
        config: the data set.
        base_dir: folder that relative paths start at.
        give_up: raise an error where the first thousand rows are bad for the same reason.

    Raises:
        SourceError: the source is not there, cannot be reached, may not be read, or has other
            columns than expected; says which, what was found and what to do.
    """
    table = _open_own_table(config, base_dir)
    columns = Columns(config.columns)
    columns.check(table, (*needed_columns(config), *config.where))
    join = _join(config, columns, table, base_dir)
    opened = OpenedDataset(table.revision, iter(()))
    joined = join(_chosen(opened.counting(table.rows), config.where, columns))
    finished = (_finished(row, config) for row in joined)
    opened.rows = _hopeless(finished, table) if give_up else finished
    return opened


def open_table(config: TableConfig, *, base_dir: Path) -> Table:
    """Open one table.

    Raises:
        SourceError: see ``open_dataset``.
    """
    if config.path is not None:
        return open_file(base_dir / config.path, header=config.header, quotes=config.quotes)
    assert config.hub is not None
    return open_hub(config.hub, base_dir=base_dir, header=config.header, quotes=config.quotes)


def _open_own_table(config: DatasetConfig, base_dir: Path) -> Table:
    """Open the table of the set itself; of a BEIR folder its judgements."""
    if config.path is None:
        return open_table(config.table, base_dir=base_dir)
    path = base_dir / config.path
    if path.is_dir():
        if config.layout != "beir":
            raise SourceError(
                "a folder, not a file",
                where=str(path),
                hint="Is it in BEIR's layout? Then say `layout: beir`",
            )
        found = beir.find_judgements(path, config.split)
        if found is None:
            splits = beir.judged_splits(path)
            raise SourceError(
                "no such file",
                where=str(path / "qrels" / f"{config.split}.tsv"),
                expected=f"one of the splits there: {', '.join(splits)}" if splits else None,
                hint="Say which in `split`, or give its file" if splits else None,
            )
        path = found
    if config.layout == "beir" and config.header is None and config.quotes is None:
        return beir.open_judgements(path)
    return open_file(path, header=config.header, quotes=config.quotes)


def _join(config: DatasetConfig, columns: Columns, table: Table, base_dir: Path) -> Join:
    """The function that makes objects of records from the rows."""
    match config.layout:
        case "beir":
            queries = _keyed(config, "queries", table, base_dir)
            corpus = _keyed(config, "corpus", table, base_dir)
            return lambda rows: joins.beir(rows, config, columns, queries, corpus)
        case "references":
            corpus = _keyed(config, "corpus", table, base_dir)
            return lambda rows: joins.references(rows, columns, corpus)
        case "scored":
            queries = _keyed(config, "queries", table, base_dir)
            corpus = _keyed(config, "corpus", table, base_dir)
            return lambda rows: joins.scored(rows, config, columns, queries, corpus)
        case "entailment":
            return lambda rows: joins.entailment(rows, columns)
        case _:
            convert = converter(config, columns, textual=table.textual)
            return lambda rows: _row_by_row(rows, convert)


def _keyed(config: DatasetConfig, name: str, own: Table, base_dir: Path) -> Keyed:
    """Open the table of documents or of queries, where the layout has it unless it is given.

    Tables of one repository are read at one commit, that of the ``own`` table of the set.
    """
    given = config.corpus if name == "corpus" else config.queries
    table = given or _usual_table(config, name, base_dir)
    if config.hub and table.hub and table.hub.id == config.hub.id and not table.hub.revision:
        at = table.hub.model_copy(update={"revision": own.revision})
        table = table.model_copy(update={"hub": at})
    keyed = Keyed(open_table(table, base_dir=base_dir), Columns(table.columns))
    if config.layout == "scored":
        one = "document" if name == "corpus" else "query"
        keyed = replace(keyed, ids=(f"{one}_id",), texts=(one,))
    if config.layout == "beir":
        keyed = replace(keyed, spell=beir.read_id)
    keyed.check()
    return keyed


def _usual_table(config: DatasetConfig, name: str, base_dir: Path) -> TableConfig:
    if config.hub is not None:
        changes = {"config": name, "split": name}
        if config.layout == "scored":  # one split per set, in three configurations
            changes = {"config": "documents" if name == "corpus" else name}
        whole = config.hub.model_copy(update={"take": None, "files": None})
        return TableConfig(hub=whole.model_copy(update=changes))
    folder = base_dir / (config.path or "")
    if config.layout == "beir" and folder.is_file() and folder.parent.name == "qrels":
        folder = folder.parent.parent
    if not folder.is_dir():
        raise SourceError(
            f"the file of judgements is given, but not its {name}",
            where=str(folder),
            hint=f"Add `{name}: {{path: …}}`, or give the folder of a set in BEIR's layout",
        )
    found = beir.find_rows(folder, name)
    if found is None:
        raise SourceError(f"no {name} in the folder", where=str(folder), expected=f"{name}.jsonl")
    return TableConfig(path=str(found.absolute()))


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


def _row_by_row(
    rows: Rows, convert: Callable[[Values], Iterator[Values]]
) -> Iterator[Joined | BadRow]:
    for row in rows:
        if isinstance(row, BadRow):
            yield row
            continue
        try:
            for values in convert(row.values):
                yield Joined(row.place, values)
        except RowError as bad:
            yield BadRow(row.place, str(bad))


def _finished(joined: Joined | BadRow, config: DatasetConfig) -> Converted | BadRow:
    """Check the object of a record and cut it to the limits of the set."""
    if isinstance(joined, BadRow):
        return joined
    try:
        record = parse_record(joined.values, config.kind)
    except RowError as bad:
        return BadRow(joined.place, str(bad))
    repeats = _repeats(joined.values, record)
    if isinstance(record, PairRecord):
        record = _limited(record, config.max_positives, config.max_negatives)
    longest = max(map(len, _texts(record)))
    if longest > config.max_characters:
        return BadRow(
            joined.place,
            f"a text of {longest:,} characters, expected at most {config.max_characters:,} "
            "(max_characters)",
        )
    return Converted(record, joined.place, repeats)


def _repeats(values: Values, record: Record) -> int:
    """Count the texts of lists that are not in the record a second time."""
    if isinstance(record, LabelRecord):
        return 0
    kept = {"negative": record.negatives}
    if isinstance(record, PairRecord):
        kept["positive"] = record.positives
    lists = ((values.get(name), texts) for name, texts in kept.items())
    return sum(len(given) - len(texts) for given, texts in lists if isinstance(given, list))


def _limited(record: PairRecord, positives: int | None, negatives: int | None) -> PairRecord:
    if positives is not None and len(record.positives) > positives:
        record = replace(
            record,
            positives=record.positives[:positives],
            positive_scores=record.positive_scores[:positives],
        )
    if negatives is not None and len(record.negatives) > negatives:
        record = replace(
            record,
            negatives=record.negatives[:negatives],
            negative_scores=record.negative_scores[:negatives],
        )
    return record


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
