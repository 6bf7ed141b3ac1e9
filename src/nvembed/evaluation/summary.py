"""Tables of evaluation results: tasks by type, an average per type, and one over all tasks.

In: results by model (of ``evaluate`` or ``read_results``). Out: text for a terminal or Markdown.
Needs neither torch nor mteb.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table

from nvembed.evaluation.reference import published_model
from nvembed.evaluation.results import TaskResult
from nvembed.evaluation.task_files import TASK_TYPES

ResultsByModel = Mapping[str, Mapping[str, TaskResult]]
TableRow = tuple[Literal["task", "type", "all"], str, Sequence[str]]
"""Kind, label, and the cells after the label."""


@dataclass(frozen=True)
class Row:
    """One line of the table; ``scores`` follow the models, ``None`` where there is no score."""

    kind: Literal["task", "type", "all"]
    label: str
    score_name: str
    scores: tuple[float | None, ...]


def summary_rows(results_by_model: ResultsByModel) -> list[Row]:
    """Lay out the results: types in the order of the paper, then others; each ends with its mean.

    An average stands only for a model that has a score on every task it is taken over, so that no
    two columns average different tasks. The last row averages over tasks, as MTEB does, not types.
    """
    models = list(results_by_model.values())
    tasks = {name: result for results in reversed(models) for name, result in results.items()}
    rows: list[Row] = []
    types = {result.type for result in tasks.values()}
    for kind in [*TASK_TYPES, *sorted(types - set(TASK_TYPES))]:
        names = sorted(name for name, result in tasks.items() if result.type == kind)
        if not names:
            continue
        for name in names:
            scores = tuple(_score(results, name) for results in models)
            rows.append(Row("task", name, tasks[name].main_score_name, scores))
        rows.append(_average("type", kind, names, models))
    if tasks:
        rows.append(_average("all", "Average", list(tasks), models))
    return rows


def format_table(results_by_model: ResultsByModel) -> str:
    """Render the results for a terminal, scores times 100, one column per model."""
    width = max(80, 44 + 14 * len(results_by_model))
    return terminal_table(list(results_by_model), _cells(results_by_model), width)


def format_markdown(results_by_model: ResultsByModel) -> str:
    """Render the results as a Markdown table, averages in bold."""
    return markdown_table(list(results_by_model), _cells(results_by_model))


def _cells(results_by_model: ResultsByModel) -> list[TableRow]:
    return [
        (row.kind, row.label, [row.score_name, *map(_shown, row.scores)])
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


def count_of_tasks(names: Sequence[str]) -> str:
    """Say over how many tasks an average is taken."""
    return "1 task" if len(names) == 1 else f"mean of {len(names)} tasks"


def published_results(name: str, results: Mapping[str, TaskResult]) -> dict[str, TaskResult]:
    """Make a column of what was published of a model, on those of the tasks that are there.

    Args:
        name: its hub id.
        results: ours, which say what is compared.

    Raises:
        ConfigError: no such model; the nearest names are given.
    """
    published = published_model(name).tasks
    return {
        task: dataclasses.replace(result, main_score=published[task] / 100, seconds=0.0, scores={})
        for task, result in results.items()
        if task in published
    }


def _average(
    kind: Literal["type", "all"],
    label: str,
    names: Sequence[str],
    models: Sequence[Mapping[str, TaskResult]],
) -> Row:
    means: list[float | None] = []
    for results in models:
        known = [value for name in names if (value := _score(results, name)) is not None]
        means.append(sum(known) / len(known) if len(known) == len(names) else None)
    return Row(kind, label, count_of_tasks(names), tuple(means))


def _score(results: Mapping[str, TaskResult], name: str) -> float | None:
    return results[name].main_score if name in results else None


def _shown(score: float | None) -> str:
    return "–" if score is None else f"{100 * score:.2f}"
