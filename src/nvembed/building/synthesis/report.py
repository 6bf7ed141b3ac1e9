"""The summary of a synthesis as a table."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from nvembed.building.synthesis.run import EXAMPLES, Summary

_COLUMNS = ("tasks", "double_tasks", "examples", "double_examples", "rejected")


def print_summary(summary: Summary, folder: Path, console: Console) -> None:
    """Print counts by kind, what it took, and how to train on it."""
    table = Table("kind", *(name.replace("_", " ") for name in _COLUMNS))
    for column in table.columns[1:]:
        column.justify = "right"
    rows = {
        kind: [getattr(counts, name) for name in _COLUMNS] for kind, counts in summary.kinds.items()
    }
    for kind, values in rows.items():
        table.add_row(kind, *(f"{value:,}" for value in values))
    table.add_section()
    totals = [sum(column) for column in zip(*rows.values(), strict=True)]
    table.add_row("all", *(f"{value:,}" for value in totals))
    console.print(table)
    uncounted = f", {summary.uncounted:,} answers uncounted" if summary.uncounted else ""
    console.print(
        f"tokens: {summary.prompt_tokens:,} in prompts, {summary.answer_tokens:,} in answers"
        f"{uncounted}; cost unknown: the endpoint does not tell",
        soft_wrap=True,
    )
    if summary.unanswered:
        console.print(
            f"{summary.unanswered:,} requests came to nothing: run the same command again",
            soft_wrap=True,
        )
    path = folder / EXAMPLES
    console.print(f"written: {path}", soft_wrap=True)
    console.print(
        f"for training on it, add to datasets: {{name: synthetic, path: {path}, kind: retrieval, "
        "instruction: null, stages: [1]}",
        soft_wrap=True,
        markup=False,
    )
