"""``nvembed compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compare(
    first: Annotated[
        Path,
        typer.Argument(
            metavar="A",
            help="Results file of `nvembed evaluate`, or a folder with a results.json.",
            show_default=False,
        ),
    ],
    second: Annotated[
        Path, typer.Argument(metavar="B", help="The same of the other model.", show_default=False)
    ],
    *,
    resamples: Annotated[
        int, typer.Option(min=100, help="Resamples of every interval and test.")
    ] = 2000,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare two models' results: differences, their intervals, and what chance explains.

    Intervals and tests need the items that `nvembed evaluate` leaves beside its results.

    Examples:

    \b
      nvembed compare base.json tuned.json
      nvembed compare runs/one/results.json runs/two/results.json --markdown > table.md
      nvembed compare base.json tuned.json --json --resamples 10000
    """
    from nvembed.core.errors import ConfigError
    from nvembed.evaluation import comparison

    if markdown and as_json:
        raise ConfigError("--markdown and --json exclude each other", expected="one of them")
    found = comparison.compare_results(first, second, resamples=resamples)
    if as_json:
        typer.echo(comparison.format_json(found))
    else:
        render = comparison.format_markdown if markdown else comparison.format_text
        typer.echo(render(found))
