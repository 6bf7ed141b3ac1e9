"""``nvembed train`` and ``nvembed ablate``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nvembed.cli.options import Recipe, echo_error, option, overrides

if TYPE_CHECKING:
    from nvembed.training.ablation.grid import GridConfig, Run
    from nvembed.training.ablation.runner import Outcome

Changes = Annotated[
    list[str] | None,
    overrides("Changes to the recipe, such as stages.0.steps=100 or stages.NAME.steps=100."),
]
Fresh = Annotated[bool, option("Delete the earlier run in the output folder.", "--fresh")]
DryRun = Annotated[
    bool, option("Say what the run would do and take, and change nothing.", "--dry-run")
]
ListRuns = Annotated[bool, option("List the runs and where they stand; run nothing.", "--dry-run")]
ReportOnly = Annotated[
    bool, option("Write the report of what is finished; run nothing.", "--report")
]


def train(
    recipe: Recipe, changes: Changes = None, fresh: Fresh = False, dry_run: DryRun = False
) -> None:
    """Train an embedding model by a recipe.

    An interrupted run goes on from its last checkpoint when started again.

    Examples:

    \b
      nvembed train recipes/small.yaml
      nvembed train recipes/small.yaml seed=1 output=runs/seed-1
      nvembed train recipes/small.yaml stages.0.steps=100
      nvembed train recipes/small.yaml --dry-run
      torchrun --nproc-per-node 8 -m nvembed train recipes/small.yaml
    """
    from nvembed.core.config import load_config
    from nvembed.training.config import TrainConfig

    config = load_config(TrainConfig, recipe, changes or ())
    if not dry_run:
        from nvembed.training.trainer import train as run_training

        model = run_training(config, base_dir=recipe.parent, fresh=fresh, recipe=recipe)
        if os.environ.get("RANK", "0") == "0":
            typer.echo(f"model: {model}")
        return
    from nvembed.training.dry_run.forecast import SeveralError
    from nvembed.training.dry_run.forecast import dry_run as forecast
    from nvembed.training.dry_run.report import print_dry_run

    try:
        print_dry_run(forecast(config, base_dir=recipe.parent, fresh=fresh))
    except SeveralError as error:
        echo_error(*(f"error: {' '.join(str(problem).split())}" for problem in error.problems))
        raise typer.Exit(error.exit_code) from error


def ablate(
    grid: Annotated[Path, typer.Argument(metavar="GRID.yaml", show_default=False)],
    changes: Annotated[list[str] | None, overrides("Keys of the grid to set.")] = None,
    *,
    processes: Annotated[int, typer.Option(min=1, help="Runs at once.")] = 1,
    dry_run: ListRuns = False,
    report_only: ReportOnly = False,
) -> None:
    """Train and score every arm of a grid over several seeds, and report what differs.

    Run again, it skips what is finished and goes on with the rest. Runs that another command is at
    work on are passed over, so two of them share a grid.

    Examples:

    \b
      nvembed ablate recipes/ablations/paper.yaml --dry-run
      nvembed ablate recipes/ablations/paper.yaml --processes 2
      nvembed ablate recipes/ablations/paper.yaml 'seeds=[0]' output=runs/quick
    """
    from nvembed.core.config import load_config
    from nvembed.core.errors import UserError
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
