"""Opening a data set, from the entry of a recipe to records: row by row, or all in memory."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from nvembed.core.errors import DataError, SourceError
from nvembed.core.files import ending_of, numbered_lines, open_text_file, parse_json, too_long
from nvembed.core.reporting import ProblemCounts
from nvembed.data.batch import Mixture, tempered_weights
from nvembed.data.built_sets import built_problem
from nvembed.data.config import FORMS, OF_RECORDS, BuildConfig, DatasetConfig, TableConfig
from nvembed.data.examples import ExampleSource, make_source
from nvembed.data.records import (
    EXPECTED,
    LABEL_HINTS,
    LABEL_KINDS,
    BadRow,
    Conversion,
    Converted,
    Kind,
    LabelRecord,
    PairRecord,
    RowError,
    label_problems,
    parse_line,
    parse_record,
    records_digest,
    texts_of,
)
from nvembed.data.sources import beir
from nvembed.data.sources.files import open_file, parquet_rows, shard_files
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
    """Open the source of a data set; a SourceError says what is wrong with it and what to do.

    ``max_records`` is not applied: what is done with the records in between decides which are used.
    With ``give_up``, an error is raised where the first thousand rows are bad for the same reason.
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
    """Open a table of texts, by default the usual one, at the same commit as the ``own`` table."""
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


_log = logging.getLogger(__name__)
_MAX_SHOWN = 5
_PLAIN = (".jsonl", ".jsonl.gz", ".parquet")
_OF_ANY_SOURCE = {*OF_RECORDS, "path", "max_characters"}


def read_records(path: str | Path, kind: Kind, *, conversion: Conversion = "example") -> list[Any]:
    """Read all records of a plain file or built set, or say what is wrong with it in a DataError.

    ``path`` is ``.jsonl``, ``.jsonl.gz``, ``.parquet`` (rows count as lines, from 1), or a folder.
    ``conversion`` is what classes will be turned into, which not all of them can.
    """
    return _all_of(_plain_rows(Path(path), kind), kind, conversion, path)


def load_records(config: DatasetConfig, *, base_dir: Path) -> list[Any]:
    """Read all records of a set that is no longer on the hub; see ``read_records``."""
    if config.path is None:
        raise SourceError(
            "the set is on the hub and was not built yet",
            where=config.name,
            hint="Run `nvembed data build` with the recipe first",
        )
    path, kind = base_dir / config.path, config.kind
    of_source = config.model_dump(exclude=_OF_ANY_SOURCE, exclude_defaults=True)
    if not of_source and (config.path.endswith(_PLAIN) or shard_files(path)):
        return read_records(path, kind, conversion=config.conversion)  # quicker
    rows = open_dataset(config, base_dir=base_dir).rows
    return _all_of(rows, kind, config.conversion, path, config)


def local_sources(dataset: DatasetConfig, base_dir: Path) -> list[Path]:
    """Files and folders that a set is read from; none where all of it is on the hub."""
    found = []
    further = [table for table in (dataset.corpus, dataset.queries) if table is not None]
    tables: list[DatasetConfig | TableConfig] = [dataset, *further]
    for table in tables:
        place = base_dir / str(table.path or (table.hub and table.hub.id))
        if table.path is not None or place.is_dir():
            found.append(place)
    return found


def load_source(
    config: DatasetConfig,
    *,
    base_dir: Path,
    records: Sequence[Any] | None = None,
    graded: bool = False,
) -> ExampleSource:
    """Read the records of a data set, unless they are given, and make its source."""
    return make_source(
        load_records(config, base_dir=base_dir) if records is None else records,
        config.kind,
        name=config.name,
        instruction=config.instruction,
        conversion=config.conversion,
        max_records=config.max_records,
        graded=graded,
    )


def load_mixture(
    datasets: Sequence[DatasetConfig],
    *,
    stage: int,
    base_dir: Path,
    temperature: float = 1.0,
    graded: bool = False,
) -> Mixture:
    """Load the sets that a stage uses, from 1; a DataError names every file that cannot be used.

    ``temperature`` evens out the sets without a weight of their own; see ``tempered_weights``.
    With ``graded`` the scores of STS sets are used as they are.
    """
    chosen = [config for config in datasets if stage in config.stages]
    sources, digests, errors = list[ExampleSource](), dict[str, str](), list[DataError]()
    for config in chosen:
        try:
            records = load_records(config, base_dir=base_dir)
            sources.append(load_source(config, base_dir=base_dir, records=records, graded=graded))
            digests[config.name] = records_digest(records)
        except DataError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise DataError(f"{len(errors)} data sets cannot be used: {' | '.join(map(str, errors))}")
    sizes, given = [len(source) for source in sources], [config.weight for config in chosen]
    return Mixture(sources, tempered_weights(sizes, given, temperature), digests)


def training_datasets(
    datasets: Sequence[DatasetConfig], build: BuildConfig | None, base_dir: Path
) -> tuple[DatasetConfig, ...]:
    """The data sets of a run, each with its built shards in place of its source.

    Without a ``build`` section they come back as they are. A DataError names all that are not
    built, or from other settings; contents are not compared: ``nvembed data build`` does that.
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
    path: str | Path,
    config: DatasetConfig | None = None,
) -> list[Any]:
    """The records of all rows of a file (or set), or one error for everything that is wrong."""
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
        told = f"the {'set' if config else 'file'} holds no records"
        raise DataError(told, where=str(path), expected=EXPECTED[kind])
    return records
