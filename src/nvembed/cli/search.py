"""``nvembed index`` and ``nvembed search``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nvembed.cli.options import (
    Columns,
    Dtype,
    SkipBadLines,
    argument,
    one_line,
    read_columns,
    value,
)
from nvembed.core.dtypes import PrecisionChoice

if TYPE_CHECKING:
    from nvembed.data.config import Column
    from nvembed.index.build import IndexReport
    from nvembed.index.search import SearchOptions

# Enough of a hit to judge it by, on one or two lines of a terminal.
SHOWN_CHARS = 160

Documents = Annotated[
    list[str] | None,
    argument("Files (JSONL, JSON, CSV, TSV, Parquet, text; .gz), folders, or - for stdin."),
]
ModelOnce = Annotated[
    str | None,
    typer.Option(help="Folder or hub id; needed once, the database remembers it."),
]
TaskOfQueries = Annotated[
    str | None,
    typer.Option(help="Instruction, or name of a task, of queries without one; of a new database."),
]
Fields = Annotated[
    str | None, typer.Option(help="Keys to keep for --where: year,lang. Default: all.")
]
Delete = Annotated[
    list[str] | None, typer.Option(help="Id of a document to remove; may be given often.")
]
DeleteFile = Annotated[Path | None, typer.Option(help="File of ids to remove, one per line.")]
TruncateDim = Annotated[
    int | None, typer.Option(min=1, help="First dimensions only; of a new database.")
]
AnnAbove = Annotated[
    int, typer.Option(min=0, help="Documents from which on search is approximate.")
]
TaskOfQuery = Annotated[
    str | None,
    typer.Option(
        help="Instruction for the query, or the name of an MTEB task (FiQA2018) or of a prompt."
    ),
]
Where = Annotated[
    str | None, typer.Option(help="Filter of a database: \"year > 2000 AND lang = 'en'\".")
]
Hybrid = Annotated[
    bool, typer.Option("--hybrid", help="In a database: by words as well, ranks fused.")
]
Exact = Annotated[
    bool, typer.Option("--exact", help="Compare with every vector of a large database.")
]
ModelNow = Annotated[str | None, typer.Option(help="Where the model of the database lies now.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print a JSON object per hit, fields and all.")
]


def index(
    documents: Documents = None,
    *,
    to: Annotated[Path, value("Folder of the database.")],
    model: ModelOnce = None,
    task: TaskOfQueries = None,
    columns: Columns = None,
    fields: Fields = None,
    delete: Delete = None,
    delete_file: DeleteFile = None,
    keep_going: SkipBadLines = False,
    truncate_dim: TruncateDim = None,
    ann_above: AnnAbove = 50_000,
    dtype: Dtype = "auto",
) -> None:
    """Write documents into an embedded vector database; run again, it embeds what is new.

    Examples:

    \b
      nvembed index docs.jsonl --to docs.db --model runs/demo/model
      nvembed index docs.jsonl more.csv folder/ --to docs.db --keep-going
      nvembed index faq.csv --to faq.db --model MODEL --column text=answer --column id=key
      nvembed index --to docs.db --delete old-1 --delete-file gone.txt
      nvembed search docs.db "sort a list" --where "year > 2000"
    """
    from nvembed.index.build import IndexOptions, index_documents, read_ids

    options = IndexOptions(
        columns=read_columns(columns),
        fields=None if fields is None else tuple(f.strip() for f in fields.split(",")),
        keep_going=keep_going,
        ann_above=ann_above,
    )
    done = index_documents(
        to,
        documents or [],
        model=model,
        task=task,
        truncate_dim=truncate_dim,
        dtype=dtype,
        delete=[*(delete or []), *(read_ids(delete_file) if delete_file else [])],
        options=options,
    )
    _tell(to, done)


def _tell(to: Path, done: IndexReport) -> None:
    typer.echo(
        f"{to}: {done.total} documents; {done.added} new, {done.updated} changed, "
        f"{done.unchanged} as they were, {done.deleted} deleted; {done.embedded} texts embedded"
    )
    if done.absent_fields:
        typer.echo(f"no document has the field {', '.join(sorted(done.absent_fields))}", err=True)
    if done.skipped.count:
        typer.echo(f"{done.skipped.count} lines left out, the first:", err=True)
        for bad in done.skipped.first:
            typer.echo(f"  {bad.place}: {bad.problem}", err=True)


def search(
    place: Annotated[
        str,
        argument("Database of nvembed index; or a model, with --documents.", metavar="DB_OR_MODEL"),
    ],
    query: Annotated[str, argument("What to look for.")],
    *,
    documents: Annotated[
        Path | None, value("A file or folder as nvembed encode takes them.")
    ] = None,
    columns: Columns = None,
    task: TaskOfQuery = None,
    top_k: Annotated[int, typer.Option(min=1, help="Number of hits.")] = 10,
    where: Where = None,
    hybrid: Hybrid = False,
    exact: Exact = False,
    model: ModelNow = None,
    as_json: AsJson = False,
    dtype: Dtype = "auto",
) -> None:
    """Find the documents of a database, or the texts of a file, that are nearest to a query.

    Examples:

    \b
      nvembed search docs.db "sort a list"
      nvembed search docs.db "sort a list" --hybrid --where "year > 2000"
      nvembed search runs/demo/model "sort a list" --documents docs.jsonl --top-k 3 \\
        --task "Given a question about Python, retrieve its documentation"
    """
    from nvembed.core.errors import ConfigError

    if documents is not None:
        if where is not None or hybrid or exact or model is not None:
            raise ConfigError(
                "--where, --hybrid, --exact and --model are of databases",
                where="--documents",
                hint="nvembed index makes a database of the file",
            )
        names = read_columns(columns)
        _search_file(place, documents, query, task or None, top_k, names, dtype, as_json=as_json)
        return
    if columns:
        raise ConfigError("a database knows its columns", where="--column", hint="Leave it out")
    from nvembed.index.search import SearchOptions

    options = SearchOptions(task, top_k, where, hybrid, exact)
    _search_database(place, query, options, model, dtype, as_json=as_json)


def _search_file(
    model: str,
    documents: Path,
    query: str,
    task: str | None,
    top_k: int,
    columns: dict[str, Column],
    dtype: PrecisionChoice,
    *,
    as_json: bool,
) -> None:
    from nvembed.encoding.file_search import search_file

    hits = search_file(
        model, documents, query, task=task, top_k=top_k, columns=columns, dtype=dtype
    )
    for hit in hits:
        if as_json:
            _echo_json(rank=hit.rank, score=hit.score, id=hit.id, text=hit.text)
            continue
        name = f"  [{hit.id}]" if hit.id is not None else ""
        typer.echo(f"{hit.rank:>3}  {hit.score:.4f}{name}  {one_line(hit.text, SHOWN_CHARS)}")


def _search_database(
    place: str,
    query: str,
    options: SearchOptions,
    model: str | None,
    dtype: PrecisionChoice,
    *,
    as_json: bool,
) -> None:
    from nvembed.index.fields import plain
    from nvembed.index.search import search_index

    for hit in search_index(place, query, options, model=model, dtype=dtype):
        if as_json:
            _echo_json(
                rank=hit.rank,
                cosine=hit.cosine,
                fused=hit.fused,
                id=hit.id,
                text=hit.text,
                fields=plain(hit.fields),
            )
            continue
        score = f"{hit.cosine:.4f}" + (f"  {hit.fused:.4f}" if hit.fused is not None else "")
        typer.echo(f"{hit.rank:>3}  {score}  [{hit.id}]  {one_line(hit.text, SHOWN_CHARS)}")


def _echo_json(**values: object) -> None:
    typer.echo(json.dumps(values, ensure_ascii=False, allow_nan=False))
