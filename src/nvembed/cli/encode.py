"""``nvembed encode``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nvembed.cli.options import DtypeOption


def encode(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder or hub id of any sentence-transformers model.", show_default=False
        ),
    ],
    *,
    input: Annotated[
        Path,
        typer.Option(help='JSONL or JSONL.gz of {"text"}, or BEIR documents.', show_default=False),
    ],
    output: Annotated[
        Path, typer.Option(help="The .npy file: one float32 row per line.", show_default=False)
    ],
    task: Annotated[
        str | None,
        typer.Option(help="Instruction: the texts are queries. Without: documents."),
    ] = None,
    field: Annotated[
        str | None, typer.Option(help='Key of the text. Default: "text", after "title".')
    ] = None,
    dtype: DtypeOption = "auto",
) -> None:
    """Turn a file of texts into a file of vectors.

    Examples:

    \b
      nvembed encode runs/demo/model --input docs.jsonl --output docs.npy
      nvembed encode runs/demo/model --input questions.jsonl --output q.npy \\
        --task "Given a question, retrieve the answer" --field question
    """
    from nvembed.inference.files import encode_file

    done = encode_file(model, input, output, task=task, field=field, dtype=dtype)
    typer.echo(f"{done.rows} vectors of width {done.dimension}: {done.output}")
    if done.ids is not None:
        typer.echo(f"their ids: {done.ids}")
