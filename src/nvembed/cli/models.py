"""``nvembed doctor`` and ``nvembed export``: a model examined, and written in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from nvembed.cli.options import argument, value


def doctor(
    model: Annotated[
        str,
        argument("Folder or hub id of any sentence-transformers model or language model."),
    ],
    *,
    task: Annotated[
        str | None,
        typer.Option(
            help="Instruction of the sample query, or an MTEB task such as SciFact. Default: NQ's."
        ),
    ] = None,
    query: Annotated[
        str | None, typer.Option(help='Sample query, such as "how do I sort a list?".')
    ] = None,
    document: Annotated[
        str | None, typer.Option(help='Sample document, such as "sorted() returns a new list.".')
    ] = None,
    batch: Annotated[
        int, typer.Option(min=1, help="Texts of the memory forecast, such as 256.")
    ] = 32,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of each of them, such as 512. Default: the limit."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Examine a model by running it: direction, pooled tokens, truncation, memory, drift.

    Exit code 0: no problem; 1: a problem was found; 2: it cannot be loaded at all.

    Examples:

    \b
      nvembed doctor runs/demo/model
      nvembed doctor runs/demo/model --task SciFact --query "zinc shortens colds"
      nvembed doctor runs/demo/model --batch 256 --max-tokens 128
      nvembed doctor sentence-transformers/all-MiniLM-L6-v2 --json
    """
    from nvembed.encoding.doctor.examine import DoctorOptions, examine_model
    from nvembed.encoding.doctor.report import print_diagnosis

    diagnosis = examine_model(model, DoctorOptions(task, query, document, batch, max_tokens))
    print_diagnosis(diagnosis, as_json=json)
    if not diagnosis.healthy:
        raise typer.Exit(1)


def export(
    model: Annotated[str, argument("Folder or hub id: saved by nvembed, or NVIDIA's layout.")],
    *,
    to: Annotated[Path, value("The new folder.")],
    format: Annotated[
        Literal["nv-embed", "nvembed", "sentence-transformers", "onnx"],
        value(
            "NVIDIA's layout, our own folder, stock sentence-transformers modules "
            "(mean pooling only), or an ONNX graph."
        ),
    ],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of the weights. Default: as they are stored."),
    ] = None,
) -> None:
    """Write an embedding model in another format, with a model card.

    Examples:

    \b
      nvembed export runs/mine/model --to out --format nv-embed --dtype float16
      nvembed export nvidia/NV-Embed-v2 --to v2 --format nvembed --dtype bfloat16
      nvembed export runs/mean/model --to plain --format sentence-transformers
      nvembed export runs/mine/model --to graph --format onnx
    """
    from nvembed.encoding.export.folders import export_folder

    export_folder(model, to, format, dtype=dtype)
    typer.echo(f"written: {to} ({format})")
