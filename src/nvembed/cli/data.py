"""``nvembed data``: training files from sources, and a look into them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nvembed.cli.synthesize import synthesize

if TYPE_CHECKING:
    from rich.console import Console

data = typer.Typer(
    help="Build training data from files and hub data sets, look into it, check it.",
    no_args_is_help=True,
)
data.command()(synthesize)


@data.command()
def build(
    recipe: Annotated[Path, typer.Argument(help="YAML file; see recipes/.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Changes to the recipe: a key path such as build.max_refused=0.1.",
            show_default=False,
        ),
    ] = None,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Go on with the other sets where one fails.")
    ] = False,
) -> None:
    """Build the data sets of a recipe: read, check, de-duplicate, decontaminate, mine, write.

    Parquet files and a manifest per set go to the folder `build.folder` of the recipe, else to
    data/<recipe> beside it. What is built already from the same settings and inputs is left alone;
    a build that was stopped goes on.

    Examples:

    \b
      nvembed data build recipes/small-built.yaml
      nvembed data build recipes/small-built.yaml --keep-going
      nvembed data build recipes/small-built.yaml build.mine=null
    """
    from nvembed.building.build import build_recipe, default_folder
    from nvembed.building.report import print_outcomes
    from nvembed.core.config import load_config
    from nvembed.core.errors import DataError
    from nvembed.training.config import TrainConfig

    config = load_config(TrainConfig, recipe, overrides or ())
    folder = default_folder(recipe)
    outcomes = build_recipe(
        config,
        base_dir=recipe.parent,
        folder=folder,
        keep_going=keep_going,
        log=lambda line: typer.echo(line, err=True),
    )
    print_outcomes(outcomes, _console())
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    if failed:
        raise DataError(
            f"{len(failed)} of {len(outcomes)} data sets failed: "
            + " | ".join(f"{outcome.name}: {outcome.error}" for outcome in failed),
            where=str(recipe),
        )
    place = recipe.parent / (config.build.folder if config.build else folder)
    if all(outcome.state == "unchanged" for outcome in outcomes):
        typer.echo(f"nothing to do: all sets were built before, in {place}")
        return
    typer.echo(f"written: {place}")
    if config.build is None:
        typer.echo(f"for training on it, add to the recipe: build: {{folder: {folder}}}")


def _console() -> Console:
    """Stdout, with room for a table where it is no terminal."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=120)
