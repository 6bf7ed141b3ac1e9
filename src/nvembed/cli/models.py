"""``nvembed doctor`` and ``nvembed export``: a model examined, and written in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from nvembed.cli.options import argument, option

Task = Annotated[
    str | None,
    option("Instruction of the sample query, or an MTEB task such as SciFact. Default: NQ's."),
]
Query = Annotated[str | None, option('Sample query, such as "how do I sort a list?".')]
Document = Annotated[str | None, option('Sample document, such as "sorted() returns a new list.".')]
MaxTokens = Annotated[
    int | None, option("Tokens of each of them, such as 512. Default: the limit.", min=1)
]
Batch = Annotated[int, typer.Option(min=1, help="Texts of the memory forecast, such as 256.")]
Format = Annotated[
    Literal["nv-embed", "nvembed", "sentence-transformers", "onnx"],
    option(
        "NVIDIA's layout, our own folder, stock sentence-transformers modules "
        "(mean pooling only), or an ONNX graph."
    ),
]
WeightType = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    option("Of the weights. Default: as they are stored."),
]


def doctor(
    model: Annotated[
        str, argument("Folder or hub id of any sentence-transformers model or language model.")
    ],
    *,
    task: Task = None,
    query: Query = None,
    document: Document = None,
    batch: Batch = 32,
    max_tokens: MaxTokens = None,
    json: Annotated[bool, option("Print JSON for machines.", "--json")] = False,
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
    to: Annotated[Path, option("The new folder.")],
    format: Format,
    dtype: WeightType = None,
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
