"""Options that several commands have, and what is read from them and printed in one way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from nvembed.core.dtypes import PrecisionChoice

if TYPE_CHECKING:
    from rich.console import Console

    from nvembed.data.config import Column


def option(help: str, *names: str, **more: Any) -> Any:
    """An option whose default is not worth showing."""
    return typer.Option(*names, help=help, show_default=False, **more)


def argument(help: str, **more: Any) -> Any:
    """An argument whose default is not worth showing."""
    return typer.Argument(help=help, show_default=False, **more)


def overrides(help: str) -> Any:
    """``KEY=VALUE`` arguments, which change a configuration."""
    return argument(help, metavar="KEY=VALUE")


Recipe = Annotated[Path, argument("YAML file; see recipes/.")]
AnyModel = Annotated[str, argument("Folder or hub id of any sentence-transformers model.")]
Dtype = Annotated[
    PrecisionChoice,
    typer.Option(help="Type of the weights; auto is what this machine computes fastest in."),
]
Columns = Annotated[
    list[str] | None,
    option(
        "Where a value is found, as `columns` of a recipe says it: text=body, id=key, "
        "query=question. May be repeated; columns of one name are joined.",
        "--column",
        metavar="NAME=COLUMN",
    ),
]
Layout = Annotated[
    str, typer.Option(help="How its rows become records; see data/sources/layouts.py.")
]
SkipBadLines = Annotated[bool, option("Leave bad lines out and count them.", "--keep-going")]
Engine = Annotated[
    Literal["local", "ray"], typer.Option(help="Who embeds: ray is a cluster's workers.")
]

# Other spellings, which earlier versions had or which are near, by the present one.
OLD_OPTIONS = {
    "--columns": "--column NAME=COLUMN",
    "--field": "--column text=NAME",
    "--text-key": "--column text=NAME",
    "--id-field": "--column id=NAME",
    "--id-key": "--column id=NAME",
}


def read_columns(given: Sequence[str] | None) -> dict[str, Column]:
    """Read ``--column``; a ConfigError where one is not of the form NAME=COLUMN."""
    from nvembed.core.errors import ConfigError

    columns: dict[str, list[str]] = {}
    for one in given or ():
        name, equals, column = one.partition("=")
        if not (name and equals and column):
            raise ConfigError(f"{one!r}", where="--column", expected="NAME=COLUMN")
        columns.setdefault(name, []).append(column)
    return {name: tuple(all) if len(all) > 1 else all[0] for name, all in columns.items()}


def echo_error(*lines: object) -> None:
    """Print lines on stderr."""
    for line in lines:
        typer.echo(line, err=True)


def bad_lines(first: Iterable[Any]) -> list[str]:
    """Render places and problems of the first lines that were left out."""
    return [f"{bad.place}: {bad.problem}" for bad in first]


def console() -> Console:
    """Stdout, with room for a table where it is no terminal."""
    from rich.console import Console

    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=120)
