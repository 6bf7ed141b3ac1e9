"""``nvembed export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def export(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder or hub id: saved by nvembed, or NVIDIA's layout.", show_default=False
        ),
    ],
    *,
    to: Annotated[Path, typer.Option(help="The new folder.", show_default=False)],
    format: Annotated[
        Literal["nv-embed", "nvembed", "sentence-transformers", "onnx"],
        typer.Option(
            help="NVIDIA's layout, our own folder, stock sentence-transformers modules "
            "(mean pooling only), or an ONNX graph.",
            show_default=False,
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
