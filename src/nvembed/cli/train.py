"""``nvembed train``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nvembed.training.config import TrainConfig


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file; see recipes/.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Changes to the recipe, such as stages.0.steps=100 or stages.NAME.steps=100.",
            show_default=False,
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete the earlier run in the output folder.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what the run would do and take, and change nothing."),
    ] = False,
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

    config = load_config(TrainConfig, recipe, overrides or ())
    if dry_run:
        _dry_run(config, recipe.parent, fresh=fresh)
        return
    from nvembed.training.trainer import train as run_training

    model = run_training(config, base_dir=recipe.parent, fresh=fresh, recipe=recipe)
    if os.environ.get("RANK", "0") == "0":
        typer.echo(f"model: {model}")


def _dry_run(config: TrainConfig, base_dir: Path, *, fresh: bool) -> None:
    from nvembed.training.dry_run.forecast import SeveralError, dry_run
    from nvembed.training.dry_run.report import print_dry_run

    try:
        print_dry_run(dry_run(config, base_dir=base_dir, fresh=fresh))
    except SeveralError as error:
        for problem in error.problems:
            typer.echo(f"error: {' '.join(str(problem).split())}", err=True)
        raise typer.Exit(error.exit_code) from error
