"""``nvembed evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from nvembed.cli.options import DtypeOption


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder or hub id of any sentence-transformers model, or bm25.",
            show_default=False,
        ),
    ],
    more: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FOLDER", help="More task folders.", show_default=False),
    ] = None,
    *,
    tasks: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FOLDER...",
            help="Task folders, or a folder of task folders.",
            show_default=False,
        ),
    ] = None,
    benchmark: Annotated[
        list[str] | None,
        typer.Option(help='A benchmark of mteb, such as "MTEB(eng, v1)".', show_default=False),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="A task of mteb, such as STS12.", show_default=False)
    ] = None,
    type: Annotated[
        list[str] | None,
        typer.Option(help="Only mteb's tasks of this type.", show_default=False),
    ] = None,
    instructions: Annotated[
        Literal["paper", "official", "mteb", "none"],
        typer.Option(help="For mteb's tasks: the package's table, or mteb's prompts."),
    ] = "paper",
    engine: Annotated[
        Literal["local", "mteb"],
        typer.Option(help="Who scores task folders: equal scores, local is faster."),
    ] = "local",
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps the vectors. Default: none.", show_default=False),
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Share the texts of each task; each process has a GPU.")
    ] = 1,
    bm25: Annotated[bool, typer.Option("--bm25", help="Show BM25 beside the model.")] = False,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="Show published scores beside: a hub id such as nvidia/NV-Embed-v2.",
            show_default=False,
        ),
    ] = None,
    start_over: Annotated[
        bool, typer.Option("--start-over", help="Replace what the output holds.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Where the scores go.")] = Path("results.json"),
    dtype: DtypeOption = "auto",
) -> None:
    """Score a model on task folders and on tasks of mteb; print a table, write the scores as JSON.

    Started again, it keeps the finished tasks. Beside the output lie the files that mteb and its
    leaderboard read (OUTPUT.mteb/results) and those of `nvembed compare`. Exit code 2 where a task
    could not be done; the others are.

    Examples:

    \b
      nvembed evaluate runs/demo/model --tasks runs/demo/tasks
      nvembed evaluate runs/demo/model --tasks tasks/stsb tasks/nfcorpus --bm25
      nvembed evaluate nvidia/NV-Embed-v2 --benchmark "MTEB(eng, v1)" --cache vectors --processes 8
      nvembed evaluate sentence-transformers/all-MiniLM-L6-v2 --task STS12 --task SciFact
    """
    from nvembed.core.errors import ConfigError, DataError
    from nvembed.evaluation.reference import published_model
    from nvembed.evaluation.run import BM25_NAME, evaluate_bm25, fits_bm25
    from nvembed.evaluation.session import (
        Settings,
        check_session,
        earlier_precision,
        run_session,
    )
    from nvembed.evaluation.summary import format_table, published_results
    from nvembed.evaluation.tasks import load_tasks

    # An option takes one value, so the other folders of `--tasks a b c` arrive as arguments.
    folders = [*(tasks or ()), *(more or ())]
    if not (folders or benchmark or task):
        raise ConfigError("nothing to evaluate", expected="--tasks, --benchmark or --task")
    for name in against or ():
        published_model(name)  # an unknown one is told before hours of work
    check_session(Settings(model, output, cache=cache), folders)
    local = load_tasks(folders)
    if model == BM25_NAME:
        local = [task for task in local if fits_bm25(task)]
        if not local:
            raise DataError(
                "BM25 has no score for any of these tasks",
                expected="a Retrieval task in a folder, with the main score ndcg_at_10",
            )
    hub, failed = [], {}
    if benchmark or task:
        from nvembed.evaluation.hub import find_hub_tasks

        found = find_hub_tasks(benchmark or (), task or (), type)
        hub, failed = list(found.tasks), found.refused
    from nvembed.model.precision import settle_precision

    precision = earlier_precision(output) if dtype == "auto" and not start_over else None
    precision = None if model == BM25_NAME else precision or settle_precision(dtype)
    settings = Settings(model, output, precision, instructions, cache, engine)
    done = run_session(settings, local, hub, processes=processes, resume=not start_over)
    columns = {model: done.results}
    if bm25 and model != BM25_NAME:
        columns[BM25_NAME] = evaluate_bm25(local)
    for name in against or ():
        columns[f"{name} (published)"] = published_results(name, done.results)
    typer.echo(format_table(columns))
    typer.echo(f"written: {output}")
    if failed := failed | done.failed:
        for name, reason in failed.items():
            typer.echo(f"not done: {name}: {reason}", err=True)
        raise DataError(f"{len(failed)} tasks could not be done", where=", ".join(failed))
