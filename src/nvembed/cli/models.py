"""``nvembed doctor``, ``export`` and ``serve``: one model examined, written anew, served."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import typer

from nvembed.cli import options as opt
from nvembed.core.arguments import PrecisionChoice
from nvembed.core.errors import ConfigError


@opt.described(
    model="Folder or hub id of any sentence-transformers model or language model.",
    task="Instruction of the sample query, or an MTEB task such as SciFact. Default: NQ's.",
    query='Sample query, such as "how do I sort a list?".',
    document='Sample document, such as "sorted() returns a new list.".',
    batch=typer.Option(min=1, help="Texts of the memory forecast, such as 256."),
    max_tokens=typer.Option(min=1, help="Tokens of each of them, such as 512. Default: the limit."),
    json="Print JSON for machines.",
)
def doctor(
    model: str,
    *,
    task: str | None = None,
    query: str | None = None,
    document: str | None = None,
    batch: int = 32,
    max_tokens: int | None = None,
    json: bool = False,
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
    from nvembed.encoding.doctor.examine import DoctorOptions, examine_model, print_diagnosis

    diagnosis = examine_model(model, DoctorOptions(task, query, document, batch, max_tokens))
    print_diagnosis(diagnosis, as_json=json)
    if not diagnosis.healthy:
        raise typer.Exit(1)


@opt.described(
    model="Folder or hub id: saved by nvembed, or NVIDIA's layout.",
    to="The new folder.",
    format="NVIDIA's layout, our own folder, stock sentence-transformers modules "
    "(mean pooling only), or an ONNX graph.",
    dtype="Of the weights. Default: as they are stored.",
)
def export(
    model: str,
    *,
    to: Path,
    format: Literal["nv-embed", "nvembed", "sentence-transformers", "onnx"],
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
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


@opt.described(
    model="Folder or hub id of any sentence-transformers model; with --ui a database.",
    overrides="key=value settings, such as batching.batch_tokens=8192.",
    host="Address; 0.0.0.0 is every network.",
    port=typer.Option(min=0, max=65535, help="0 takes any free one."),
    keys="File of API keys, one name:key per line. Without: no key is needed.",
    config="YAML file of settings.",
    ui="A page to search a database of `nvembed index`.",
    moved=typer.Option(
        "--model", help="With --ui: where the model of the database lies now, if it moved."
    ),
)
def serve(
    model: str,
    overrides: list[str] | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    keys: Path | None = None,
    config: Path | None = None,
    dtype: PrecisionChoice = "auto",
    ui: bool = False,
    moved: str | None = None,
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
