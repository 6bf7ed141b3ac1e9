"""``nvembed search``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nvembed.cli.options import ColumnOption, DtypeOption, read_columns
from nvembed.core.dtypes import PrecisionChoice

if TYPE_CHECKING:
    from nvembed.index.search import SearchOptions

# Enough of a hit to judge it by, on one or two lines of a terminal.
SHOWN_CHARS = 160


def search(
    place: Annotated[
        str,
        typer.Argument(
            metavar="DB_OR_MODEL",
            help="Database of nvembed index; or a model, with --documents.",
            show_default=False,
        ),
    ],
    query: Annotated[str, typer.Argument(help="What to look for.", show_default=False)],
    *,
    documents: Annotated[
        Path | None,
        typer.Option(help="A file or folder as nvembed encode takes them.", show_default=False),
    ] = None,
    columns: ColumnOption = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="Instruction for the query, or the name of an MTEB task (FiQA2018) or of a prompt."
        ),
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Number of hits.")] = 10,
    where: Annotated[
        str | None, typer.Option(help="Filter of a database: \"year > 2000 AND lang = 'en'\".")
    ] = None,
    hybrid: Annotated[
        bool, typer.Option("--hybrid", help="In a database: by words as well, ranks fused.")
    ] = False,
    exact: Annotated[
        bool, typer.Option("--exact", help="Compare with every vector of a large database.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="Where the model of the database lies now.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object per hit, fields and all.")
    ] = False,
    dtype: DtypeOption = "auto",
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
        from nvembed.index.search import SearchOptions

        options = SearchOptions(task, top_k, where, hybrid, exact)
        _search_database(place, query, options, model, dtype, as_json=as_json)
        return
    if where is not None or hybrid or exact or model is not None:
        raise ConfigError(
            "--where, --hybrid, --exact and --model are of databases",
            where="--documents",
            hint="nvembed index makes a database of the file",
        )
    from nvembed.encoding.file_search import search_file

    hits = search_file(
        place,
        documents,
        query,
        task=task or None,
        top_k=top_k,
        columns=read_columns(columns),
        dtype=dtype,
    )
    for hit in hits:
        if as_json:
            _echo_json(rank=hit.rank, score=hit.score, id=hit.id, text=hit.text)
            continue
        name = f"  [{hit.id}]" if hit.id is not None else ""
        typer.echo(f"{hit.rank:>3}  {hit.score:.4f}{name}  {_shown(hit.text)}")


def _search_database(
    place: str,
    query: str,
    options: SearchOptions,
    model: str | None,
    dtype: PrecisionChoice,
    *,
    as_json: bool,
) -> None:
    from nvembed.core.errors import ConfigError
    from nvembed.index.database import Database, is_database
    from nvembed.index.fields import plain
    from nvembed.index.record import recorded_encoder
    from nvembed.index.search import search_database

    if not is_database(place):
        raise ConfigError(
            "no database",
            where=place,
            expected="a folder that nvembed index has made",
            hint="To search a file with a model, give --documents FILE",
        )
    database = Database.open(Path(place))
    database.count(options.where)  # a wrong filter is told before the model is loaded
    encoder = recorded_encoder(database.record, model, dtype, place)
    for hit in search_database(database, encoder, query, options):
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
        typer.echo(f"{hit.rank:>3}  {score}  [{hit.id}]  {_shown(hit.text)}")


def _echo_json(**values: object) -> None:
    typer.echo(json.dumps(values, ensure_ascii=False, allow_nan=False))


def _shown(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARS else line[: SHOWN_CHARS - 1] + "…"
