"""``nvembed index`` and ``nvembed search``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from nvembed.cli.options import (
    Columns,
    Dtype,
    SkipBadLines,
    argument,
    bad_lines,
    echo_error,
    option,
    read_columns,
)

# Enough of a hit to judge it by, on one or two lines of a terminal.
SHOWN_CHARS = 160

Documents = Annotated[
    list[str] | None,
    argument("Files (JSONL, JSON, CSV, TSV, Parquet, text; .gz), folders, or - for stdin."),
]
ModelOnce = Annotated[
    str | None, option("Folder or hub id; needed once, the database remembers it.")
]
TaskOfQueries = Annotated[
    str | None,
    option("Instruction, or name of a task, of queries without one; of a new database."),
]
Fields = Annotated[str | None, option("Keys to keep for --where: year,lang. Default: all.")]
Delete = Annotated[list[str] | None, option("Id of a document to remove; may be given often.")]
DeleteFile = Annotated[Path | None, option("File of ids to remove, one per line.")]
TruncateDim = Annotated[int | None, option("First dimensions only; of a new database.", min=1)]
AnnAbove = Annotated[
    int, typer.Option(min=0, help="Documents from which on search is approximate.")
]
Place = Annotated[
    str,
    argument("Database of nvembed index; or a model, with --documents.", metavar="DB_OR_MODEL"),
]
TextFiles = Annotated[Path | None, option("A file or folder as nvembed encode takes them.")]
TaskOfQuery = Annotated[
    str | None,
    option("Instruction for the query, or the name of an MTEB task (FiQA2018) or of a prompt."),
]
Where = Annotated[str | None, option("Filter of a database: \"year > 2000 AND lang = 'en'\".")]
Hybrid = Annotated[bool, option("In a database: by words as well, ranks fused.", "--hybrid")]
Exact = Annotated[bool, option("Compare with every vector of a large database.", "--exact")]
ModelNow = Annotated[str | None, option("Where the model of the database lies now.")]
AsJson = Annotated[bool, option("Print a JSON object per hit, fields and all.", "--json")]


def index(
    documents: Documents = None,
    *,
    to: Annotated[Path, option("Folder of the database.")],
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

    kept = None if fields is None else tuple(field.strip() for field in fields.split(","))
    done = index_documents(
        to,
        documents or [],
        model=model,
        task=task,
        truncate_dim=truncate_dim,
        dtype=dtype,
        delete=[*(delete or []), *(read_ids(delete_file) if delete_file else [])],
        options=IndexOptions(read_columns(columns), kept, keep_going, ann_above),
    )
    typer.echo(
        f"{to}: {done.total} documents; {done.added} new, {done.updated} changed, "
        f"{done.unchanged} as they were, {done.deleted} deleted; {done.embedded} texts embedded"
    )
    if done.absent_fields:
        echo_error(f"no document has the field {', '.join(sorted(done.absent_fields))}")
    if done.skipped.count:
        echo_error(f"{done.skipped.count} lines left out, the first:")
        echo_error(*(f"  {line}" for line in bad_lines(done.skipped.first)))


def search(
    place: Place,
    query: Annotated[str, argument("What to look for.")],
    *,
    documents: TextFiles = None,
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

    if documents is None:
        if columns:
            raise ConfigError("a database knows its columns", where="--column", hint="Leave it out")
        from nvembed.index.search import SearchOptions, search_index

        options = SearchOptions(task, top_k, where, hybrid, exact)
        for hit in search_index(place, query, options, model=model, dtype=dtype):
            _show(hit, ("rank", "cosine", "fused", "id", "text", "fields"), as_json)
        return
    if where is not None or hybrid or exact or model is not None:
        raise ConfigError(
            "--where, --hybrid, --exact and --model are of databases",
            where="--documents",
            hint="nvembed index makes a database of the file",
        )
    from nvembed.encoding.file_search import search_file

    names = read_columns(columns)
    for file_hit in search_file(
        place, documents, query, task=task or None, top_k=top_k, columns=names, dtype=dtype
    ):
        _show(file_hit, ("rank", "score", "id", "text"), as_json)


def _show(hit: Any, keys: tuple[str, ...], as_json: bool) -> None:
    """Print a hit of a database or of a file."""
    values = {key: getattr(hit, key) for key in keys}
    if as_json:
        if "fields" in values:
            from nvembed.index.fields import plain

            values["fields"] = plain(values["fields"])
        typer.echo(json.dumps(values, ensure_ascii=False, allow_nan=False))
        return
    scores = (values.get(key) for key in ("score", "cosine", "fused"))
    shown = [f"{score:.4f}" for score in scores if score is not None]
    shown += [f"[{hit.id}]"] if hit.id is not None else []
    line = " ".join(hit.text.split())
    line = line if len(line) <= SHOWN_CHARS else line[: SHOWN_CHARS - 1] + "…"
    typer.echo("  ".join([f"{hit.rank:>3}", *shown, line]))
