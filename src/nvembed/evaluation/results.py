"""What an evaluation leaves: ``results.json``, the items of each main score, and tables.

``results.json`` has one entry per finished task. The items, for resampling, are one ``.npz``
without pickle per task in the folder ``<results>.items`` beside it; ``significance`` reads them.
Neither torch nor mteb is needed.
"""

from __future__ import annotations

import dataclasses
import io
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from nvembed.core.errors import DataError
from nvembed.core.files import atomic_path, read_json_object, write_json
from nvembed.core.ownership import remove
from nvembed.evaluation.reference import published_model
from nvembed.evaluation.task_files import TASK_TYPES

EVALUATE = "evaluate"


@dataclass(frozen=True)
class TaskResult:
    """The scores of one model on one task."""

    type: str  # mteb's name
    main_score_name: str
    main_score: float | None  # mostly 0 to 1, higher is better; None for constant vectors
    seconds: float  # wall time, encoding included
    scores: Mapping[str, float | None]  # the main one among them


class UnreachableTaskError(DataError):
    """The data of one task of mteb could not be loaded; others may be."""


def write_results(
    path: str | Path, results: Mapping[str, TaskResult], made_by: str | None = None
) -> None:
    """Write task name → result as JSON, atomically; ``made_by`` as in ``atomic_path``."""
    values = {name: dataclasses.asdict(result) for name, result in results.items()}
    write_json(path, values, made_by)


def read_results(path: str | Path) -> dict[str, TaskResult]:
    """Read a file of ``write_results``; a ``DataError`` where it is missing or something else."""
    expected = "a results.json of `nvembed evaluate`"
    values = read_json_object(Path(path), expected)
    try:
        return TypeAdapter(dict[str, TaskResult]).validate_python(values)
    except ValidationError as error:
        raise DataError("not evaluation results", where=str(path), expected=expected) from error


def run_file(results: str | Path) -> Path:
    """Where the record of what results were made with lies: ``a.json`` → ``a.run.json``."""
    return Path(results).with_suffix(".run.json")


# --- Items ----------------------------------------------------------------------------------------

ItemKind = Literal["values", "correlation", "pairs", "classes", "clusters"]
"""How the main score comes from the arrays."""

_ARRAYS: dict[str, set[str]] = {
    "values": {"values_N"},  # the mean, per query or article
    "correlation": {"gold_N", "similarities_N"},  # per pair
    "pairs": {"gold_N", "similarities_SN"},  # labels, and what the score is the best of
    "classes": {"gold_N", "predicted_EN"},  # per test text, the predictions of E experiments
    "clusters": {"gold_N", "assigned_EN", "drawn_EN"},  # and how often a text was drawn
}


@dataclass(frozen=True)
class Items:
    """The items of one model on one task; the last axis of the arrays runs over them."""

    kind: ItemKind
    score: str
    task_hash: str  # of the task's data: only items of equal data can be paired
    arrays: Mapping[str, NDArray[Any]]

    def __len__(self) -> int:
        return int(next(iter(self.arrays.values())).shape[-1])


def items_folder(results: str | Path) -> Path:
    """Where the items of a results file lie: ``runs/a.json`` → ``runs/a.items``."""
    return Path(results).with_suffix(".items")


def _items_file(folder: str | Path, name: str) -> Path:
    return Path(folder) / f"{quote(name, safe=' ')}.npz"  # names of tasks may hold slashes


def write_items(folder: str | Path, name: str, items: Items, made_by: str | None = None) -> None:
    """Write the items of the task ``name`` atomically; ``made_by`` as in ``atomic_path``."""
    arrays: dict[str, Any] = {**items.arrays}
    arrays |= {key: np.array(getattr(items, key)) for key in ("kind", "score", "task_hash")}
    path = _items_file(folder, name)
    with atomic_path(path, made_by) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


def keep_items(folder: str | Path, names: Collection[str]) -> None:
    """Delete the items of all other tasks: they may be another model's."""
    for path in set(Path(folder).glob("*.npz")) - {_items_file(folder, name) for name in names}:
        remove(path)


def read_items(folder: str | Path, name: str) -> Items | None:
    """Read the items of the task ``name``; ``None`` where none were written."""
    path = _items_file(folder, name)
    if not path.is_file():
        return None
    try:
        # Opened here, since np.load leaves a damaged file open.
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        kind, score, hashed = (str(arrays.pop(key)) for key in ("kind", "score", "task_hash"))
        lengths = {array.shape[-1:] for array in arrays.values()}
        if set(arrays) != _ARRAYS[kind] or len(lengths) != 1:
            raise ValueError
    # TypeError: a single array is no archive.
    except (OSError, EOFError, ValueError, TypeError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(
            "not items of an evaluation",
            where=str(path),
            expected="a file that `nvembed evaluate` wrote",
            hint="Delete it and evaluate the task again",
        ) from error
    kinds: Any = kind
    return Items(kinds, score, hashed, arrays)


# --- Tables ---------------------------------------------------------------------------------------

ResultsByModel = Mapping[str, Mapping[str, TaskResult]]
RowKind = Literal["task", "type", "all"]
TableRow = tuple[RowKind, str, Sequence[str]]
"""Kind, label, and the cells after the label."""


class Row(NamedTuple):
    """One line of the table; ``scores`` follow the models, ``None`` where there is no score."""

    kind: RowKind
    label: str
    score_name: str
    scores: tuple[float | None, ...]


def lay_out(results: Mapping[str, TaskResult]) -> Iterator[tuple[RowKind, str, str, list[str]]]:
    """Yield (kind, label, name of the score, tasks) of each line; the last averages over tasks."""

    def count(names: Collection[str]) -> str:
        return "1 task" if len(names) == 1 else f"mean of {len(names)} tasks"

    others = {result.type for result in results.values()} - set(TASK_TYPES)
    for kind in [*TASK_TYPES, *sorted(others)]:
        names = sorted(name for name, result in results.items() if result.type == kind)
        for name in names:
            yield "task", name, results[name].main_score_name, [name]
        if names:
            yield "type", kind, count(names), names
    if results:
        yield "all", "Average", count(results), list(results)


def summary_rows(results_by_model: ResultsByModel) -> list[Row]:
    """Lay out the results of models; only a model with all tasks of an average has one."""
    models = list(results_by_model.values())
    tasks = {name: result for results in reversed(models) for name, result in results.items()}

    def mean(results: Mapping[str, TaskResult], names: Sequence[str]) -> float | None:
        scores = [results[name].main_score for name in names if name in results]
        known = [score for score in scores if score is not None]
        return sum(known) / len(known) if len(known) == len(names) else None

    return [
        Row(kind, label, score, tuple(mean(results, names) for results in models))
        for kind, label, score, names in lay_out(tasks)
    ]


def format_table(results_by_model: ResultsByModel, *, markdown: bool = False) -> str:
    """Render the results as text, scores times 100, one column per model."""
    rows: list[TableRow] = [
        (kind, label, [name, *("–" if s is None else f"{100 * s:.2f}" for s in scores)])
        for kind, label, name, scores in summary_rows(results_by_model)
    ]
    width = max(80, 44 + 14 * len(results_by_model))
    return table_text(list(results_by_model), rows, width, markdown=markdown)


format_markdown = partial(format_table, markdown=True)


def table_text(
    titles: Sequence[str], rows: Sequence[TableRow], width: int, *, markdown: bool
) -> str:
    """Draw rows of tasks and averages; ``titles`` are those after task and score."""
    if markdown:
        escaped = [title.replace("|", "\\|") for title in titles]
        lines = [f"| task | score | {' | '.join(escaped)} |", f"|---|---|{'---:|' * len(titles)}"]
        for kind, label, cells in rows:
            shown = [label.replace("|", "\\|"), *cells]
            if kind != "task":
                shown = [f"**{cell}**" if cell else cell for cell in shown]
            lines.append(f"| {' | '.join(shown)} |")
        return "\n".join(lines)
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


def published_results(name: str, results: Mapping[str, TaskResult]) -> dict[str, TaskResult]:
    """Make a column of what was published of a model, by its hub id, on those of the tasks."""
    published = published_model(name).tasks
    return {
        task: dataclasses.replace(result, main_score=published[task] / 100, seconds=0.0, scores={})
        for task, result in results.items()
        if task in published
    }
