"""``nvembed serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nvembed.cli.options import DtypeOption


def serve(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder or hub id of any sentence-transformers model.", show_default=False
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key=value settings, such as batching.batch_tokens=8192."),
    ] = None,
    *,
    host: Annotated[str, typer.Option(help="Address; 0.0.0.0 is every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 8000,
    keys: Annotated[
        Path | None,
        typer.Option(help="File of API keys, one name:key per line. Without: no key is needed."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    dtype: DtypeOption = "auto",
) -> None:
    """Serve a model over HTTP: OpenAI's /v1/embeddings, TEI's /embed and /rerank, /metrics.

    Examples:

    \b
      nvembed serve runs/demo/model
      nvembed serve runs/demo/model model_name=docs --port 9000 --keys keys.txt
      nvembed serve runs/demo/model --host 0.0.0.0 --keys keys.txt --config server.yaml
    """
    from nvembed.serving.run import serve as serve_model

    serve_model(
        model,
        host=host,
        port=port,
        config=config,
        overrides=overrides or (),
        keys=keys,
        dtype=dtype,
    )
