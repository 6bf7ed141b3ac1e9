"""``nvembed evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nvembed.cli.options import DtypeOption


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder or hub id of any sentence-transformers model.", show_default=False
        ),
    ],
    more: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FOLDER", help="More task folders.", show_default=False),
    ] = None,
    *,
    tasks: Annotated[
        list[Path],
        typer.Option(
            metavar="FOLDER...",
            help="Task folders, or a folder of task folders.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option(help="Where the scores go.")] = Path("results.json"),
    dtype: DtypeOption = "auto",
) -> None:
    """Score a model on local tasks; print a table and write the scores as JSON.

    Examples:

    \b
      nvembed evaluate runs/demo/model --tasks runs/demo/tasks
      nvembed evaluate runs/demo/model --tasks tasks/stsb tasks/nfcorpus
      nvembed evaluate sentence-transformers/all-MiniLM-L6-v2 --tasks tasks/*
    """
    from nvembed.evaluation.run import evaluate_folders
    from nvembed.evaluation.summary import format_table

    # An option takes one value, so the other folders of `--tasks a b c` arrive as arguments.
    results = evaluate_folders(model, [*tasks, *(more or ())], output, dtype=dtype)
    typer.echo(format_table({model: results}))
    typer.echo(f"written: {output}")
