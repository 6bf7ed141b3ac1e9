"""``nvembed ablate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def ablate(
    grid: Annotated[Path, typer.Argument(metavar="GRID.yaml", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Keys of the grid to set.", show_default=False),
    ] = None,
    *,
    processes: Annotated[int, typer.Option(min=1, help="Runs at once.")] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the runs and where they stand; run nothing.")
    ] = False,
    report_only: Annotated[
        bool, typer.Option("--report", help="Write the report of what is finished; run nothing.")
    ] = False,
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
    from nvembed.training.ablation.grid import GridConfig, Run, grid_runs
    from nvembed.training.ablation.report import report_files, write_report
    from nvembed.training.ablation.runner import ABLATE, Outcome, read_outcome, run_grid

    config = load_config(GridConfig, grid, overrides or ())
    base_dir = grid.parent
    runs = grid_runs(config, base_dir)
    if dry_run:
        for run in runs:
            typer.echo(f"{run.arm} seed {run.seed}: {read_outcome(run).state}")
        return
    check_outputs(
        report_files(config),
        made_by=ABLATE,
        inputs=[grid, base_dir / config.recipe, *(base_dir / folder for folder in config.tasks)],
    )
    if report_only:
        typer.echo(f"report: {write_report(config, runs)}")
        return

    def tell(run: Run, outcome: Outcome) -> None:
        detail = outcome.error or (
            f"trained {outcome.training_seconds:.0f} s, scored {outcome.evaluation_seconds:.0f} s"
        )
        typer.echo(f"{run.arm} seed {run.seed}: {outcome.state}, {detail}")

    outcomes = run_grid(
        runs,
        base_dir=(base_dir / config.recipe).parent,
        task_folders=[base_dir / folder for folder in config.tasks],
        task_names=config.task_names,
        processes=processes,
        keep_models=config.keep_models,
        on_done=tell,
    )
    typer.echo(f"report: {write_report(config, runs)}")
    failed = [run for run, o in zip(runs, outcomes, strict=True) if o.state == "failed"]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(runs)} runs failed, the first is {failed[0].arm} with seed "
            f"{failed[0].seed}",
            where=str(failed[0].folder / "arm.log"),
            hint="Run the command again to try them once more",
        )
