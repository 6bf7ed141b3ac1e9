"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

from nvembed.model.settings import PrecisionChoice

DtypeOption = Annotated[
    PrecisionChoice,
    typer.Option(help="Type of the weights; auto is what this machine computes fastest in."),
]
