"""``nvembed encode``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from nvembed.cli.options import ColumnOption, DtypeOption, read_columns


def encode(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder or hub id of any sentence-transformers model.", show_default=False
        ),
    ],
    *,
    input: Annotated[
        list[Path],
        typer.Option(
            help="JSONL, CSV, TSV, JSON (also .gz), Parquet, .txt (a text per line), a folder, or "
            "- for stdin; may be repeated.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            help="A .npy file, one row per text, or a .parquet file or .lance table with ids.",
            show_default=False,
        ),
    ],
    task: Annotated[
        str | None,
        typer.Option(
            help="Instruction, or the name of an MTEB task (FiQA2018) or of a prompt of the model: "
            "the texts are queries. Without: documents."
        ),
    ] = None,
    columns: ColumnOption = None,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Leave bad lines out and count them.")
    ] = False,
    dtype: DtypeOption = "auto",
    truncate_dim: Annotated[
        int | None,
        typer.Option(min=1, help="Keep the first dimensions only, at length 1, such as 256."),
    ] = None,
    precision: Annotated[
        Literal["float32", "int8", "uint8", "binary"],
        typer.Option(help="Of the numbers, as in sentence-transformers; binary keeps the sign."),
    ] = "float32",
    long: Annotated[
        Literal["cut", "windows", "late"],
        typer.Option(
            help="Texts beyond the model's limit: keep the beginning; or the mean of overlapping "
            "windows; or late chunking, a vector per chunk of every text, read in one piece."
        ),
    ] = "cut",
    overlap: Annotated[int, typer.Option(min=0, help="Tokens that windows share.")] = 64,
    chunk_tokens: Annotated[int, typer.Option(min=1, help="Longest chunk of --long late.")] = 256,
    processes: Annotated[
        int, typer.Option(min=1, help="Share out the texts, with a GPU each where there are some.")
    ] = 1,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="Who embeds: ray is a cluster's workers.")
    ] = "local",
) -> None:
    """Turn a file of texts into a file of vectors.

    Examples:

    \b
      nvembed encode runs/demo/model --input docs.jsonl --output docs.npy
      nvembed encode runs/demo/model --input questions.jsonl --output q.npy \\
        --task "Given a question, retrieve the answer" --column text=question
      nvembed encode runs/demo/model --input questions.jsonl --output q.npy --task FiQA2018
      nvembed encode runs/demo/model --input docs.jsonl --output docs.npy \\
        --truncate-dim 128 --precision int8
      nvembed encode MODEL --input books --output chunks.lance --long late --processes 2
    """
    from nvembed.encoding.files import encode_file
    from nvembed.encoding.outputs import OutputFormat
    from nvembed.model.settings import LongTexts

    form = OutputFormat(truncate_dim, precision)
    done = encode_file(
        model,
        input,
        output,
        task=task,
        columns=read_columns(columns),
        form=form,
        dtype=dtype,
        keep_going=keep_going,
        long=LongTexts(long, overlap, chunk_tokens),
        processes=processes,
        engine=engine,
    )
    if done.skipped is not None and done.skipped.count:
        for bad in done.skipped.first:
            typer.echo(f"left out: {bad.place}: {bad.problem}", err=True)
        typer.echo(f"{done.skipped.count} bad lines were left out", err=True)
    typer.echo(f"{done.rows} vectors of width {done.dimension}: {done.output}")
    if done.ids is not None:
        typer.echo(f"their ids: {done.ids}")
    if done.ranges is not None:
        typer.echo(f"the ranges of their {precision} numbers: {done.ranges}")
