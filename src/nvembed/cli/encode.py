"""``nvembed encode``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


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
        typer.Option(
            help="Instruction, or an MTEB task whose instruction is known (FiQA2018): the texts "
            "are queries. Without: documents."
        ),
    ] = None,
    field: Annotated[
        str | None, typer.Option(help='Key of the text. Default: "text", after "title".')
    ] = None,
) -> None:
    """Turn a file of texts into a file of vectors.

    Examples:

    \b
      nvembed encode runs/demo/model --input docs.jsonl --output docs.npy
      nvembed encode runs/demo/model --input questions.jsonl --output q.npy \\
        --task "Given a question, retrieve the answer" --field question
      nvembed encode runs/demo/model --input questions.jsonl --output q.npy \\
        --task FiQA2018
    """
    from nvembed.inference.files import encode_file
    from nvembed.text.instructions import read_task

    done = encode_file(model, input, output, task=read_task(task), field=field)
    typer.echo(f"{done.rows} vectors of width {done.dimension}: {done.output}")
    if done.ids is not None:
        typer.echo(f"their ids: {done.ids}")
