"""``nvembed index``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nvembed.cli.options import ColumnOption, DtypeOption, read_columns


def index(
    documents: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files (JSONL, JSON, CSV, TSV, Parquet, text; .gz), folders, or - for stdin.",
            show_default=False,
        ),
    ] = None,
    *,
    to: Annotated[Path, typer.Option(help="Folder of the database.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option(help="Folder or hub id; needed once, the database remembers it."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="Instruction, or name of a task, of queries without one; of a new database."
        ),
    ] = None,
    columns: ColumnOption = None,
    fields: Annotated[
        str | None, typer.Option(help="Keys to keep for --where: year,lang. Default: all.")
    ] = None,
    delete: Annotated[
        list[str] | None, typer.Option(help="Id of a document to remove; may be given often.")
    ] = None,
    delete_file: Annotated[
        Path | None, typer.Option(help="File of ids to remove, one per line.")
    ] = None,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Leave bad lines out and count them.")
    ] = False,
    truncate_dim: Annotated[
        int | None, typer.Option(min=1, help="First dimensions only; of a new database.")
    ] = None,
    ann_above: Annotated[
        int, typer.Option(min=0, help="Documents from which on search is approximate.")
    ] = 50_000,
    dtype: DtypeOption = "auto",
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
