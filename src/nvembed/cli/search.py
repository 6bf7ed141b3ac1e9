"""``nvembed search``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nvembed.cli.options import DtypeOption

# Enough of a hit to judge it by, on one or two lines of a terminal.
SHOWN_CHARS = 160


def search(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder or hub id of any sentence-transformers model.", show_default=False
        ),
    ],
    query: Annotated[str, typer.Argument(help="What to look for.", show_default=False)],
    *,
    documents: Annotated[
        Path,
        typer.Option(help='JSONL or JSONL.gz of {"text"}, or BEIR documents.', show_default=False),
    ],
    task: Annotated[
        str | None,
        typer.Option(help="Instruction for the query, or an MTEB task that has one (FiQA2018)."),
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Number of hits.")] = 10,
    dtype: DtypeOption = "auto",
) -> None:
    """Find the texts of a file that are nearest to a query.

    Examples:

    \b
      nvembed search runs/demo/model "sort a list" --documents docs.jsonl
      nvembed search runs/demo/model "sort a list" --documents docs.jsonl --top-k 3 \\
        --task "Given a question about Python, retrieve its documentation"
    """
    from nvembed.inference.search import search_file
    from nvembed.text.instructions import read_task

    task = read_task(task)
    for hit in search_file(model, documents, query, task=task, top_k=top_k, dtype=dtype):
        text = " ".join(hit.text.split())
        shown = text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 1] + "…"
        name = f"  [{hit.id}]" if hit.id is not None else ""
        typer.echo(f"{hit.rank:>3}  {hit.score:.4f}{name}  {shown}")
