"""``nvembed mine``, ``train`` and ``ablate``: from pairs to a model, and which model is better."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from nvembed.cli import options as opt
from nvembed.core.errors import ConfigError, UserError

if TYPE_CHECKING:
    from nvembed.mining.selection import MiningReport
    from nvembed.training.ablation.grid import GridConfig, Run
    from nvembed.training.ablation.runner import Outcome
    from nvembed.training.config import TrainConfig


@dataclass(frozen=True)
class _Records:
    """What the pairs are, and what else is searched."""

    kind: Literal["retrieval", "nli", "sts"] = "retrieval"
    layout: str = "records"
    columns: list[str] | None = None
    instruction: str | None = None
    documents: Path | None = None


@dataclass(frozen=True, kw_only=True)
class _Teacher(opt.Weights):
    """Who scores the candidates."""

    teacher: str
    teacher_model: str | None = None
    engine: Literal["local", "ray"] = "local"


@opt.described(
    input='Records {"query", "positive"}: any file that training reads, or a BEIR folder.',
    output="The same records with negatives, as JSONL.",
    settings=opt.overrides(
        "Mining settings, such as num_negatives=7, strategy=margin or rerank=MODEL."
    ),
    teacher="Who scores the candidates: folder or hub id of any sentence-transformers model, "
    "bm25, or the address of an OpenAI-compatible endpoint (http://…/v1; its key in "
    "$NVEMBED_API_KEY).",
    teacher_model="Name of the model at an endpoint.",
    kind="What the records are.",
    instruction="Task that is put before queries whose record brings none, or the name of an MTEB "
    "task.",
    documents="File or folder of texts to search. Default: the input's own documents.",
    work="Folder for vectors and search results, kept for the next run and shared by "
    "processes. Default: a hidden one beside the output until that is written.",
    samples=typer.Option(min=0, help="Records to show at the end."),
)
def mine(
    input: Path,
    output: Path,
    settings: list[str] | None = None,
    *,
    teacher: _Teacher,
    records: _Records,
    work: Path | None = None,
    samples: int = 2,
) -> None:
    """Find hard negatives for pairs of queries and documents.

    They are near the query, yet clearly below its positive. A run that was killed goes on where it
    was when it is started again. With --work, several processes share the work: start the command
    several times, or with torchrun.

    Examples:

    \b
      nvembed mine pairs.jsonl mined.jsonl --teacher runs/demo/model
      nvembed mine pairs.jsonl mined.jsonl --teacher intfloat/e5-base-v2 \\
        --documents docs.jsonl --instruction "Find the answer"
      nvembed mine pairs.jsonl mined.jsonl --teacher bm25 num_negatives=15
      nvembed mine faq.csv mined.jsonl --teacher bm25 --column query=question \\
        --column positive=answer
      nvembed mine pairs.jsonl mined.jsonl --teacher http://localhost:8000/v1 \\
        --teacher-model my-embedder rerank=BAAI/bge-reranker-base
      torchrun --nproc-per-node=8 -m nvembed mine pairs.jsonl mined.jsonl \\
        --teacher nvidia/NV-Embed-v2 --documents docs.jsonl --work mining
    """
    from nvembed.core.config import load_config
    from nvembed.data.config import MiningConfig
    from nvembed.mining.miner import Mining, PairFiles, help_mining, mine_pairs

    columns = opt.read_columns(records.columns)
    config = load_config(MiningConfig, None, settings or ())
    files = PairFiles(input, records.kind, records.layout, columns, records.documents)
    mining = Mining(
        teacher.teacher,
        config,
        records.instruction,
        teacher.engine,
        teacher.teacher_model,
        teacher.precision,
    )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and work is None:
        raise ConfigError("several processes share it", where="--work", expected="a folder")
    if work is not None and int(os.environ.get("RANK", "0")):  # the first process writes
        help_mining(files, replace(mining, engine="local"), work)
        return
    _show_mined(mine_pairs(files, mining, output, work), samples)
    typer.echo(f"written: {output}")


def _show_mined(report: MiningReport, samples: int) -> None:
    """Print the counts, how many negatives may be positives that nobody labelled, and samples."""
    from rich.console import Console
    from rich.table import Table

    typer.echo(
        f"{report.records} records, {report.negatives} negatives among {report.documents} documents"
        f", {report.share_with_fewer:.1%} of the records got fewer than asked for"
    )
    table = Table(title="Negatives that may be positives: score at least …")
    for heading in ("of the positive's", "mined", "nearest, without a rule"):
        table.add_column(heading, justify="right")
    for row in report.near_positive:
        shares = ("-" if share is None else f"{share:.1%}" for share in (row.mined, row.nearest))
        table.add_row(f"{row.of_positive:.0%}", *shares)
    Console().print(table)
    for sample in report.samples[:samples]:
        typer.echo(f"\nquery             {' '.join(sample.query.split())[:100]}")
        rows = [("positive", sample.positive)]
        rows += [("negative", scored) for scored in sample.negatives[:3]]
        rows += [("refused", scored) for scored in sample.refused[:3]]
        for label, scored in rows:
            typer.echo(f"  {label:<8} {scored.score:6.3f} {' '.join(scored.text.split())[:100]}")


@opt.described(
    changes=opt.overrides(
        "Changes to the recipe, such as stages.0.steps=100 or stages.NAME.steps=100."
    ),
    fresh="Delete the earlier run in the output folder.",
    dry_run="Say what the run would do and take, and change nothing.",
    find_rate="Train the first stage for some steps at several learning rates, say which is best, "
    "and leave nothing.",
    minutes=typer.Option(min=0.1, help="With --find-rate: about as long as it may take."),
    plot="With --find-rate: PNG to draw the losses to.",
)
def train(
    recipe: Path,
    changes: list[str] | None = None,
    *,
    fresh: bool = False,
    dry_run: bool = False,
    find_rate: bool = False,
    minutes: float = 15,
    plot: Path | None = None,
) -> None:
    """Train an embedding model by a recipe.

    An interrupted run goes on from its last checkpoint when started again.

    Examples:

    \b
      nvembed train recipes/small.yaml
      nvembed train recipes/small.yaml seed=1 output=runs/seed-1
      nvembed train recipes/small.yaml stages.0.steps=100
      nvembed train recipes/small.yaml --dry-run
      nvembed train recipes/small.yaml --find-rate --plot rates.png
      torchrun --nproc-per-node 8 -m nvembed train recipes/small.yaml
    """
    from nvembed.core.config import load_config
    from nvembed.training.config import TrainConfig

    config = load_config(TrainConfig, recipe, changes or ())
    if find_rate and dry_run:
        raise ConfigError("given together with --dry-run", where="--find-rate", expected="one")
    if plot is not None and not find_rate:
        raise ConfigError("draws what --find-rate finds", where="--plot", expected="--find-rate")
    if find_rate:
        from nvembed.training.find_rate import find_rate as search
        from nvembed.training.find_rate import lines_of

        found = search(config, base_dir=recipe.parent, minutes=minutes, plot=plot)
        typer.echo("\n".join(lines_of(found)))
        return
    if not dry_run:
        from nvembed.training.trainer import train as run_training

        model = run_training(config, base_dir=recipe.parent, fresh=fresh, recipe=recipe)
        if os.environ.get("RANK", "0") == "0":
            _tell_outcome(config, recipe.parent, model)
        return
    from nvembed.training.dry_run import SeveralError
    from nvembed.training.dry_run import dry_run as forecast
    from nvembed.training.forecast import print_dry_run

    try:
        print_dry_run(forecast(config, base_dir=recipe.parent, fresh=fresh))
    except SeveralError as error:
        opt.echo_error(*(f"error: {' '.join(str(problem).split())}" for problem in error.problems))
        raise typer.Exit(error.exit_code) from error


def _tell_outcome(config: TrainConfig, base_dir: Path, model: Path) -> None:
    """Print where the model is; after evaluations also a table of them, and what to do next."""
    from nvembed.evaluation.results import format_table
    from nvembed.training.metrics import run_scores

    if columns := run_scores(config, base_dir):
        typer.echo(format_table(columns))
    typer.echo(f"model: {model}")
    if columns and config.evaluation:
        folders = [os.path.normpath(base_dir / folder) for folder in config.evaluation.tasks]
        place, tasks = shlex.quote(str(model)), shlex.join(folders)
        typer.echo(
            f"next:\n  nvembed evaluate {place} --tasks {tasks}\n"
            f"  nvembed index DOCUMENTS --to documents.db --model {place}\n  nvembed serve {place}"
        )


@opt.described(
    grid=typer.Argument(metavar="GRID.yaml", show_default=False),
    changes=opt.overrides("Keys of the grid to set."),
    processes=typer.Option(min=1, help="Runs at once."),
    dry_run="List the runs and where they stand; run nothing.",
    report_only=typer.Option("--report", help="Write the report of what is finished; run nothing."),
)
def ablate(
    grid: Path,
    changes: list[str] | None = None,
    *,
    processes: int = 1,
    dry_run: bool = False,
    report_only: bool = False,
) -> None:
    """Train and score a grid of arms and seeds, and report.

    Run again, it skips what is finished and goes on with the rest. Runs that another command is at
    work on are passed over, so two of them share a grid.

    Examples:

    \b
      nvembed ablate recipes/ablations/paper.yaml --dry-run
      nvembed ablate recipes/ablations/paper.yaml --processes 2
      nvembed ablate recipes/ablations/paper.yaml 'seeds=[0]' output=runs/quick
    """
    from nvembed.core.config import load_config
    from nvembed.core.ownership import check_outputs
    from nvembed.training.ablation.grid import GridConfig, grid_runs
    from nvembed.training.ablation.report import report_files, write_report
    from nvembed.training.ablation.runner import ABLATE, read_outcome

    config = load_config(GridConfig, grid, changes or ())
    runs = grid_runs(config, grid.parent)
    if dry_run:
        for run in runs:
            typer.echo(f"{run.arm} seed {run.seed}: {read_outcome(run).state}")
        return
    read = [grid, *(grid.parent / path for path in (config.recipe, *config.tasks))]
    check_outputs(report_files(config), made_by=ABLATE, inputs=read)
    failed = [] if report_only else _run_grid(config, runs, grid.parent, processes)
    typer.echo(f"report: {write_report(config, runs)}")
    if failed:
        first = f"the first is {failed[0].arm} with seed {failed[0].seed}"
        raise UserError(
            f"{len(failed)} of {len(runs)} runs failed, {first}",
            where=str(failed[0].folder / "arm.log"),
            hint="Run the command again to try them once more",
        )


def _run_grid(config: GridConfig, runs: list[Run], base_dir: Path, processes: int) -> list[Run]:
    """Run what is not finished; return the runs that failed."""
    from nvembed.training.ablation.runner import GridJob, run_grid

    def tell(run: Run, outcome: Outcome) -> None:
        detail = outcome.error or (
            f"trained {outcome.training_seconds:.0f} s, scored {outcome.evaluation_seconds:.0f} s"
        )
        typer.echo(f"{run.arm} seed {run.seed}: {outcome.state}, {detail}")

    job = GridJob(
        base_dir=(base_dir / config.recipe).parent,
        task_folders=[base_dir / folder for folder in config.tasks],
        task_names=config.task_names,
        processes=processes,
        keep_models=config.keep_models,
    )
    outcomes = run_grid(runs, job, on_done=tell)
    return [run for run, o in zip(runs, outcomes, strict=True) if o.state == "failed"]
