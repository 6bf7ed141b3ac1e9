"""``nvembed doctor``, ``export`` and ``serve``: one model examined, written anew, served."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from nvembed.cli import options as opt
from nvembed.cli.options import argument, option
from nvembed.core.errors import ConfigError

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


Served = Annotated[
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
    model: Served,
    overrides: Settings = None,
    *,
    host: Annotated[str, typer.Option(help="Address; 0.0.0.0 is every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 8000,
    keys: Keys = None,
    config: Annotated[Path | None, option("YAML file of settings.")] = None,
    dtype: opt.Dtype = "auto",
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
