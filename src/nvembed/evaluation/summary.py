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
from nvembed.evaluation.tasks import TASK_TYPES

ResultsByModel = Mapping[str, Mapping[str, TaskResult]]


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
    table = Table()
    table.add_column("task", no_wrap=True)
    table.add_column("score", no_wrap=True)
    for model in results_by_model:
        table.add_column(model, justify="right", overflow="fold", min_width=6)
    for row in summary_rows(results_by_model):
        label = f"  {row.label}" if row.kind == "task" else row.label
        table.add_row(
            label, row.score_name, *map(_shown, row.scores), end_section=row.kind != "task"
        )
    out = io.StringIO()
    console = Console(file=out, width=max(80, 44 + 14 * len(results_by_model)), no_color=True)
    console.print(table)
    return out.getvalue().rstrip("\n")


def format_markdown(results_by_model: ResultsByModel) -> str:
    """Render the results as a Markdown table, averages in bold."""
    models = [model.replace("|", "\\|") for model in results_by_model]
    lines = [
        f"| task | score | {' | '.join(models)} |",
        f"|---|---|{'---:|' * len(models)}",
    ]
    for row in summary_rows(results_by_model):
        cells = [row.label.replace("|", "\\|"), row.score_name, *map(_shown, row.scores)]
        if row.kind != "task":
            cells = [f"**{cell}**" for cell in cells]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


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
    count = "1 task" if len(names) == 1 else f"mean of {len(names)} tasks"
    return Row(kind, label, count, tuple(means))


def _score(results: Mapping[str, TaskResult], name: str) -> float | None:
    return results[name].main_score if name in results else None


def _shown(score: float | None) -> str:
    return "–" if score is None else f"{100 * score:.2f}"
