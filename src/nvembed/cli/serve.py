"""``nvembed serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nvembed.cli.options import DtypeOption
from nvembed.core.errors import ConfigError


def serve(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder or hub id of any sentence-transformers model; with --ui a database.",
            show_default=False,
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
    ui: Annotated[
        bool, typer.Option("--ui", help="A page to search a database of `nvembed index`.")
    ] = False,
    moved: Annotated[
        str | None,
        typer.Option(
            "--model", help="With --ui: where the model of the database lies now, if it moved."
        ),
    ] = None,
) -> None:
    """Serve a model over HTTP: OpenAI's /v1/embeddings, TEI's /embed and /rerank, /metrics.

    With --ui, serve a page to search a database instead.

    Examples:

    \b
      nvembed serve runs/demo/model
      nvembed serve runs/demo/model model_name=docs --port 9000 --keys keys.txt
      nvembed serve runs/demo/model --host 0.0.0.0 --keys keys.txt --config server.yaml
      nvembed serve runs/demo/db --ui
    """
    if ui:
        from nvembed.cli.serve_ui import serve_page

        if overrides or keys is not None or config is not None:
            raise ConfigError(
                "settings, --keys and --config are of the model server",
                expected="none of them with --ui",
            )
        serve_page(model, host=host, port=port, model=moved, dtype=dtype)
        return
    if moved is not None:
        raise ConfigError("--model goes with --ui", expected="the model as the first argument")
    if (Path(model) / "documents.lance").is_dir():
        raise ConfigError("is a database, not a model", where=model, expected="--ui to search it")
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
