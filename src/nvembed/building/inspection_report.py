"""An inspection for reading."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nvembed.building.inspection import Inspection, Spread

_SHOWN_CHARACTERS = 160


def print_inspection(found: Inspection, console: Console) -> None:
    """Print the numbers of a set, a table of lengths and its samples."""
    console.print(f"[bold]{escape(found.name)}[/bold] ({found.kind}): {_summary(found)}")
    for problem in found.problems:
        console.print(f"  bad row {escape(problem)}", highlight=False)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in ("texts", "mean", "min", "median", "90 %", "99 %", "max"):
        table.add_column(name, justify="right")
    for side, spread in found.characters.items():
        table.add_row(f"{side}, characters", *_cells(spread))
        if found.tokens is not None:
            table.add_row(f"{side}, tokens", *_cells(found.tokens[side]))
    for side, spread in found.per_record.items():
        table.add_row(f"{side} of a record", *_cells(spread))
    console.print(table)
    for sample in found.samples:
        for key, value in sample.items():
            console.print(f"  {key}: {_short(value)}", markup=False, highlight=False)
        console.print()


def _summary(found: Inspection) -> str:
    parts = [f"{found.records:,} records", f"{found.repeated:,} repeated"]
    if found.bad:
        parts.append(f"{found.bad:,} bad rows")
    if found.without_negatives is not None:
        parts.append(f"{found.without_negatives:,} without negatives")
    if found.trained_on is not None:
        parts.append(f"{found.trained_on:,} scored 4 or more")
    if found.classes is not None and found.largest and found.smallest:
        (most, largest), (least, smallest) = found.largest[0], found.smallest[0]
        parts.append(
            f"{found.classes:,} classes from {smallest:,} ({escape(least)}) "
            f"to {largest:,} ({escape(most)})"
        )
    return ", ".join(parts)


def _cells(spread: Spread) -> list[str]:
    numbers = (spread.min, spread.median, spread.p90, spread.p99, spread.max)
    return [f"{spread.count:,}", f"{spread.mean:,.1f}", *(f"{number:,}" for number in numbers)]


def _short(value: object) -> str:
    if isinstance(value, list):
        shown = " | ".join(_short(item) for item in value[:2])
        return shown + (f" | … {len(value)} in all" if len(value) > 2 else "")
    text = " ".join(str(value).split())
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"
