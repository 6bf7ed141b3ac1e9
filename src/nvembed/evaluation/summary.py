"""Tables of evaluation results: tasks by type, an average per type, and one over all tasks.

In: results by model (of ``evaluate`` or ``read_results``). Out: text for a terminal or Markdown.
Needs neither torch nor mteb.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table

from nvembed.evaluation.reference import published_model
from nvembed.evaluation.results import TaskResult
from nvembed.evaluation.task_files import TASK_TYPES

ResultsByModel = Mapping[str, Mapping[str, TaskResult]]
RowKind = Literal["task", "type", "all"]
TableRow = tuple[RowKind, str, Sequence[str]]
"""Kind, label, and the cells after the label."""


@dataclass(frozen=True)
class Row:
    """One line of the table; ``scores`` follow the models, ``None`` where there is no score."""

    kind: RowKind
    label: str
    score_name: str
    scores: tuple[float | None, ...]


def lay_out(results: Mapping[str, TaskResult]) -> Iterator[tuple[RowKind, str, str, list[str]]]:
    """Yield (kind, label, name of the score, tasks) of each line of a table.

    Types come in the order of the paper, then others, each with its tasks by name and its average;
    the last line averages over tasks, as MTEB does, not types.
    """
    others = {result.type for result in results.values()} - set(TASK_TYPES)
    for kind in [*TASK_TYPES, *sorted(others)]:
        names = sorted(name for name, result in results.items() if result.type == kind)
        for name in names:
            yield "task", name, results[name].main_score_name, [name]
        if names:
            yield "type", kind, _count(names), names
    if results:
        yield "all", "Average", _count(list(results)), list(results)


def _count(names: Sequence[str]) -> str:
    return "1 task" if len(names) == 1 else f"mean of {len(names)} tasks"


def summary_rows(results_by_model: ResultsByModel) -> list[Row]:
    """Lay out the results of several models.

    An average stands only for a model that has a score on every task it is taken over, so that no
    two columns average different tasks.
    """
    models = list(results_by_model.values())
    tasks = {name: result for results in reversed(models) for name, result in results.items()}
    return [
        Row(kind, label, score, tuple(_mean(results, names) for results in models))
        for kind, label, score, names in lay_out(tasks)
    ]


def _mean(results: Mapping[str, TaskResult], names: Sequence[str]) -> float | None:
    scores = [results[name].main_score for name in names if name in results]
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if len(known) == len(names) else None


def format_table(results_by_model: ResultsByModel) -> str:
    """Render the results for a terminal, scores times 100, one column per model."""
    width = max(80, 44 + 14 * len(results_by_model))
    return terminal_table(list(results_by_model), _cells(results_by_model), width)


def format_markdown(results_by_model: ResultsByModel) -> str:
    """Render the results as a Markdown table, averages in bold."""
    return markdown_table(list(results_by_model), _cells(results_by_model))


def _cells(results_by_model: ResultsByModel) -> list[TableRow]:
    return [
        (
            row.kind,
            row.label,
            [row.score_name, *("–" if s is None else f"{100 * s:.2f}" for s in row.scores)],
        )
        for row in summary_rows(results_by_model)
    ]


def terminal_table(titles: Sequence[str], rows: Sequence[TableRow], width: int) -> str:
    """Draw rows of tasks and averages; ``titles`` are those after task and score."""
    table = Table()
    for title in ("task", "score"):
        table.add_column(title, no_wrap=True)
    for title in titles:
        table.add_column(title, justify="right", overflow="fold", min_width=6)
    for kind, label, cells in rows:
        indented = f"  {label}" if kind == "task" else label
        table.add_row(indented, *cells, end_section=kind != "task")
    out = io.StringIO()
    Console(file=out, width=width, no_color=True).print(table)
    return out.getvalue().rstrip("\n")


def markdown_table(titles: Sequence[str], rows: Sequence[TableRow]) -> str:
    """Write rows of tasks and averages as Markdown, averages in bold."""
    escaped = [title.replace("|", "\\|") for title in titles]
    lines = [f"| task | score | {' | '.join(escaped)} |", f"|---|---|{'---:|' * len(titles)}"]
    for kind, label, cells in rows:
        shown = [label.replace("|", "\\|"), *cells]
        if kind != "task":
            shown = [f"**{cell}**" if cell else cell for cell in shown]
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def published_results(name: str, results: Mapping[str, TaskResult]) -> dict[str, TaskResult]:
    """Make a column of what was published of a model, by its hub id, on those tasks of ``results``.

    Raises:
        ConfigError: no such model; the nearest names are given.
    """
    published = published_model(name).tasks
    return {
        task: dataclasses.replace(result, main_score=published[task] / 100, seconds=0.0, scores={})
        for task, result in results.items()
        if task in published
    }
