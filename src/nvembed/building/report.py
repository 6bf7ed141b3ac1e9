"""The table that a build ends with."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from nvembed.building.build import SetOutcome

COLUMNS = ("read", "refused", "duplicates", "contaminated", "not used", "mined", "written")


def set_numbers(outcome: SetOutcome) -> dict[str, int | None]:
    """The numbers of a set under ``COLUMNS``; None where a step was not done.

    ``not used`` are records beyond the cap; ``refused`` includes those of classes that cannot be
    converted; ``mined`` is the number of mined negatives.
    """
    if outcome.manifest is None:
        return dict.fromkeys(COLUMNS)
    steps = outcome.manifest["steps"]
    clean, mine = steps.get("decontaminate"), steps.get("mine")
    return {
        "read": steps["read"]["in"],
        "refused": steps["read"]["refused"] + steps["select"]["unusable_classes"],
        "duplicates": steps["distinct"]["in"] - steps["distinct"]["out"],
        "contaminated": clean and clean["in"] - clean["out"],
        "not used": steps["select"]["beyond_cap"],
        "mined": mine and mine["negatives"],
        "written": outcome.manifest["rows"],
    }


def print_outcomes(outcomes: Sequence[SetOutcome], console: Console) -> None:
    """Print one row per set and a sum."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("data set", no_wrap=True)
    for name in COLUMNS:
        table.add_column(name, justify="right")
    table.add_column("state")
    sums = dict.fromkeys(COLUMNS, 0)
    for outcome in outcomes:
        numbers = set_numbers(outcome)
        cells = ["–" if value is None else f"{value:,}" for value in numbers.values()]
        table.add_row(outcome.name, *cells, outcome.state)
        for name, value in numbers.items():
            sums[name] += value or 0
    if len(outcomes) > 1:
        table.add_section()
        table.add_row("all", *(f"{value:,}" for value in sums.values()), "")
    console.print(table)
