"""``nvembed encode``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from nvembed.cli.options import (
    AnyModel,
    Columns,
    Dtype,
    Engine,
    SkipBadLines,
    bad_lines,
    echo_error,
    option,
    read_columns,
)

Input = Annotated[
    list[Path],
    option(
        "JSONL, CSV, TSV, JSON (also .gz), Parquet, .txt (a text per line), a folder, or "
        "- for stdin; may be repeated."
    ),
]
Output = Annotated[
    Path, option("A .npy file, one row per text, or a .parquet file or .lance table with ids.")
]
Task = Annotated[
    str | None,
    option(
        "Instruction, or the name of an MTEB task (FiQA2018) or of a prompt of the model: "
        "the texts are queries. Without: documents."
    ),
]
TruncateDim = Annotated[
    int | None, option("Keep the first dimensions only, at length 1, such as 256.", min=1)
]
NumberType = Annotated[
    Literal["float32", "int8", "uint8", "binary"],
    typer.Option(help="Of the numbers, as in sentence-transformers; binary keeps the sign."),
]
Long = Annotated[
    Literal["cut", "windows", "late"],
    typer.Option(
        help="Texts beyond the model's limit: keep the beginning; or the mean of overlapping "
        "windows; or late chunking, a vector per chunk of every text, read in one piece."
    ),
]
Overlap = Annotated[int, typer.Option(min=0, help="Tokens that windows share.")]
ChunkTokens = Annotated[int, typer.Option(min=1, help="Longest chunk of --long late.")]
Processes = Annotated[
    int, typer.Option(min=1, help="Share out the texts, with a GPU each where there are some.")
]


def encode(
    model: AnyModel,
    *,
    input: Input,
    output: Output,
    task: Task = None,
    columns: Columns = None,
    keep_going: SkipBadLines = False,
    dtype: Dtype = "auto",
    truncate_dim: TruncateDim = None,
    precision: NumberType = "float32",
    long: Long = "cut",
    overlap: Overlap = 64,
    chunk_tokens: ChunkTokens = 256,
    processes: Processes = 1,
    engine: Engine = "local",
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

    done = encode_file(
        model,
        input,
        output,
        task=task,
        columns=read_columns(columns),
        form=OutputFormat(truncate_dim, precision),
        dtype=dtype,
        keep_going=keep_going,
        long=LongTexts(long, overlap, chunk_tokens),
        processes=processes,
        engine=engine,
    )
    if done.skipped is not None and done.skipped.count:
        echo_error(*(f"left out: {line}" for line in bad_lines(done.skipped.first)))
        echo_error(f"{done.skipped.count} bad lines were left out")
    typer.echo(f"{done.rows} vectors of width {done.dimension}: {done.output}")
    if done.ids is not None:
        typer.echo(f"their ids: {done.ids}")
    if done.ranges is not None:
        typer.echo(f"the ranges of their {precision} numbers: {done.ranges}")
