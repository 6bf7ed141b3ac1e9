"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from nvembed.core.dtypes import PrecisionChoice

if TYPE_CHECKING:
    from nvembed.data.sources.config import Column

DtypeOption = Annotated[
    PrecisionChoice,
    typer.Option(help="Type of the weights; auto is what this machine computes fastest in."),
]

ColumnOption = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        metavar="NAME=COLUMN",
        help="Where a value is found, as `columns` of a recipe says it: text=body, id=key, "
        "query=question. May be repeated; columns of one name are joined.",
        show_default=False,
    ),
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
    """Read ``--column``: columns of the source by the names that the package knows.

    Raises:
        ConfigError: one is not of the form NAME=COLUMN.
    """
    from nvembed.core.errors import ConfigError

    columns: dict[str, Column] = {}
    for one in given or ():
        name, equals, column = one.partition("=")
        if not (name and equals and column):
            raise ConfigError(f"{one!r}", where="--column", expected="NAME=COLUMN")
        before = columns.get(name)
        before = (before,) if isinstance(before, str) else before
        columns[name] = column if before is None else (*before, column)
    return columns
