"""``nvembed train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file; see recipes/.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Changes to the recipe: a key path such as stages.0.steps=100.",
            show_default=False,
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete the earlier run in the output folder.")
    ] = False,
) -> None:
    """Train an embedding model by a recipe.

    An interrupted run goes on from its last checkpoint when started again.

    Examples:

    \b
      nvembed train recipes/small.yaml
      nvembed train recipes/small.yaml seed=1 output=runs/seed-1
      nvembed train recipes/small.yaml stages.0.steps=100
    """
    from nvembed.core.config import load_config
    from nvembed.training.config import TrainConfig
    from nvembed.training.trainer import train as run_training

    config = load_config(TrainConfig, recipe, overrides or ())
    model = run_training(config, base_dir=recipe.parent, fresh=fresh)
    typer.echo(f"model: {model}")
