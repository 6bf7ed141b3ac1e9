"""``nvembed serve``: the model server, or with ``--ui`` the page of a database."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nvembed.cli.options import Dtype, argument, option
from nvembed.core.errors import ConfigError

Model = Annotated[
    str, argument("Folder or hub id of any sentence-transformers model; with --ui a database.")
]
Settings = Annotated[
    list[str] | None, argument("key=value settings, such as batching.batch_tokens=8192.")
]
Keys = Annotated[
    Path | None, option("File of API keys, one name:key per line. Without: no key is needed.")
]
Page = Annotated[bool, option("A page to search a database of `nvembed index`.", "--ui")]
Moved = Annotated[
    str | None,
    option("With --ui: where the model of the database lies now, if it moved.", "--model"),
]


def serve(
    model: Model,
    overrides: Settings = None,
    *,
    host: Annotated[str, typer.Option(help="Address; 0.0.0.0 is every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 8000,
    keys: Keys = None,
    config: Annotated[Path | None, option("YAML file of settings.")] = None,
    dtype: Dtype = "auto",
    ui: Page = False,
    moved: Moved = None,
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
    settings = overrides or ()
    if ui:
        if settings or keys is not None or config is not None:
            raise ConfigError(
                "settings, --keys and --config are of the model server",
                expected="none of them with --ui",
            )
        import uvicorn

        from nvembed.index.database import Database
        from nvembed.index.page import page_app
        from nvembed.index.record import recorded_encoder

        database = Database.open(Path(model))
        encoder = recorded_encoder(database.record, moved, dtype, model)
        typer.echo(f"{database.count()} documents: http://{host}:{port}/ (Ctrl-C ends it)")
        uvicorn.run(page_app(database, encoder), host=host, port=port, log_level="warning")
        return
    if moved is not None:
        raise ConfigError("--model goes with --ui", expected="the model as the first argument")
    if (Path(model) / "documents.lance").is_dir():
        raise ConfigError("is a database, not a model", where=model, expected="--ui to search it")
    from nvembed.serving.server import serve as run

    run(model, host=host, port=port, config=config, overrides=settings, keys=keys, dtype=dtype)
