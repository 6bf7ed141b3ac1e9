"""``nvembed evaluate``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from nvembed.cli.options import DtypeOption

if TYPE_CHECKING:
    from nvembed.core.errors import UserError


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
            help="Task folders or BEIR folders, or a folder of such folders.",
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
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Score the other tasks where one is broken.")
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
      nvembed evaluate runs/demo/model --tasks beir/scifact beir/fiqa --keep-going
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
    failed: dict[str, str] = {}
    local = load_tasks(folders, broken=failed if keep_going else None)
    if model == BM25_NAME:
        local = [task for task in local if fits_bm25(task)]
        if not local:
            raise DataError(
                "BM25 has no score for any of these tasks",
                expected="a Retrieval task in a folder, with the main score ndcg_at_10",
            )
    hub = []
    if benchmark or task:
        from nvembed.evaluation.hub import find_hub_tasks

        found = find_hub_tasks(benchmark or (), task or (), type)
        hub, failed = list(found.tasks), failed | found.refused
    if not (local or hub):
        raise _not_done(failed)
    precision = None
    if model != BM25_NAME:
        from nvembed.encoding.load import settle_dtype

        begun = earlier_precision(output) if dtype == "auto" and not start_over else None
        precision = settle_dtype(model, dtype, begun=begun)
    settings = Settings(model, output, precision, instructions, cache, engine)
    done = run_session(
        settings, local, hub, processes=processes, resume=not start_over, keep_going=keep_going
    )
    columns = {model: done.results}
    if bm25 and model != BM25_NAME:
        columns[BM25_NAME] = evaluate_bm25(local)
    for name in against or ():
        columns[f"{name} (published)"] = published_results(name, done.results)
    typer.echo(format_table(columns))
    typer.echo(f"written: {output}")
    if failed := failed | done.failed:
        raise _not_done(failed)


def _not_done(failed: Mapping[str, str]) -> UserError:
    """Say which tasks have no result and why, a line for each; the error counts them."""
    from nvembed.core.errors import DataError

    for name, reason in failed.items():
        typer.echo(f"not done: {name}: {reason}", err=True)
    count = f"{len(failed)} task{'s' if len(failed) > 1 else ''}"
    return DataError(f"{count} could not be done", where=", ".join(failed))
