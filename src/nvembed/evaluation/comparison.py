"""Compares the results of two models, task by task and on average, and says what chance explains.

In: two results files, or folders with a ``results.json``. Out: a ``Comparison``, and its table as
text, Markdown or JSON. Neither torch nor mteb is needed. Next file: ``cli/compare.py``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nvembed.core.errors import DataError
from nvembed.core.reporting import progress
from nvembed.core.text_files import read_json_object
from nvembed.evaluation.results import TaskResult, items_folder, read_items, read_results
from nvembed.evaluation.significance import (
    RESAMPLES,
    Difference,
    compare_items,
    holm,
    mean_difference,
    sign_flip_p,
)
from nvembed.evaluation.summary import count_of_tasks, markdown_table, terminal_table
from nvembed.evaluation.task_files import TASK_TYPES

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class ComparedRow:
    """One task, or the average of a type's or of all tasks.

    Attributes:
        kind: ``task``, ``type`` or ``all``.
        name: of the task or type.
        score_name: of the main score; of averages how many tasks they are over.
        first: score of the first model.
        second: score of the second model.
        difference: second less first.
        low: of its 95 % interval, the tasks being these; ``None`` where items are missing.
        high: of it.
        p: of a task, of its own test; of an average, over tasks (signs flipped), ``None`` with
            fewer than two tasks.
        p_holm: of a task, adjusted for the number of tasks tested.
        significant: whether that is below 0.05; for averages, whether p is.
    """

    kind: Literal["task", "type", "all"]
    name: str
    score_name: str
    first: float
    second: float
    difference: float
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None
    significant: bool


@dataclass(frozen=True)
class Comparison:
    """What ``compare_results`` found.

    Attributes:
        first: name of the first model.
        second: name of the second model.
        rows: tasks by type, each type ending with its average, then the average of all.
        notes: what keeps the comparison from being one of models alone, or from being tested.
    """

    first: str
    second: str
    rows: tuple[ComparedRow, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Side:
    path: Path
    name: str
    results: dict[str, TaskResult]
    run: Mapping[str, Any]


def compare_results(
    first: str | Path, second: str | Path, *, resamples: int = RESAMPLES
) -> Comparison:
    """Compare two models on the tasks that both have a score for.

    Args:
        first: results file of `nvembed evaluate`, or a folder with a ``results.json``.
        second: the same of the other model.
        resamples: of every interval and drawn test.

    Raises:
        DataError: a file is missing or damaged, or no task is in both.
    """
    sides = _read_side(Path(first)), _read_side(Path(second))
    names = [name for name in sides[0].results if name in sides[1].results]
    if not names:
        own, other = (", ".join(list(side.results)[:3]) or "none" for side in sides)
        raise DataError(
            f"no task in common with {sides[1].path}",
            where=str(sides[0].path),
            expected="results on the same tasks",
            hint=f"One has {own}; the other {other}",
        )
    notes = _notes_on_runs(sides, names)
    kept: dict[str, tuple[float, float]] = {}
    for name in names:
        one, other_ = (side.results[name] for side in sides)
        if (one.type, one.main_score_name) != (other_.type, other_.main_score_name):
            notes.append(f"{name}: left out, the main scores differ")
        elif one.main_score is None or other_.main_score is None:
            notes.append(f"{name}: left out, a score is undefined")
        else:
            kept[name] = one.main_score, other_.main_score
    tested, missing = _test(sides, list(kept), resamples, notes)
    if missing:
        notes.append(
            f"only scores can be compared of {_listed(missing)}: there are no items. To have them, "
            "run `nvembed evaluate` again on these tasks, for both models"
        )
    rows = _rows(kept, sides[0].results, tested)
    return Comparison(sides[0].name, sides[1].name, tuple(rows), tuple(notes))


def _read_side(path: Path) -> _Side:
    file = path / "results.json" if path.is_dir() else path
    results = read_results(file)
    record = file.with_name(f"{file.stem}.run.json")
    run = read_json_object(record, "the record of an evaluation") if record.is_file() else {}
    return _Side(file, str(run.get("model") or path), results, run)


def _notes_on_runs(sides: tuple[_Side, _Side], names: Sequence[str]) -> list[str]:
    """Say in what else than the model two evaluations differ."""
    notes = []
    told = [side.run.get("instructions") for side in sides]
    if isinstance(told[0], dict) and isinstance(told[1], dict):
        other = [name for name in names if told[0].get(name) != told[1].get(name)]
        if other:
            notes.append(f"the instructions differ on {_listed(other)}")
    for side in sides:
        if not side.run:
            notes.append(f"{side.path}: no record beside it of model, instructions and versions")
    if all(side.run for side in sides):
        if sides[0].run.get("model") == sides[1].run.get("model"):
            notes.append(f"both are results of {sides[0].name}")
        for key in ("revision", "dtype"):
            values = [side.run.get(key) for side in sides]
            if values[0] != values[1]:
                notes.append(f"{key}: {values[0]} and {values[1]}")
        versions = [_versions(side.run) for side in sides]
        differ = [name for name in versions[0] if versions[0][name] != versions[1].get(name)]
        if differ:
            notes.append(f"evaluated with other versions of {_listed(differ)}")
    return notes


def _versions(run: Mapping[str, Any]) -> dict[str, Any]:
    environment = run.get("environment")
    packages = environment.get("packages") if isinstance(environment, dict) else None
    return packages if isinstance(packages, dict) else {}


def _test(
    sides: tuple[_Side, _Side], names: Sequence[str], resamples: int, notes: list[str]
) -> tuple[dict[str, Difference], list[str]]:
    """Test every task whose items both models have; return the others' names too."""
    tested: dict[str, Difference] = {}
    missing = []
    with progress(len(names), "compare") as bar:
        for name in names:
            items = [read_items(items_folder(side.path), name) for side in sides]
            bar.advance()
            if items[0] is None or items[1] is None:
                missing.append(name)
            elif items[0].task_hash != items[1].task_hash:
                notes.append(f"{name}: not tested, the two were evaluated on different data")
            else:
                tested[name] = compare_items(items[0], items[1], resamples=resamples)
    return tested, missing


def _rows(
    scores: Mapping[str, tuple[float, float]],
    results: Mapping[str, TaskResult],
    tested: Mapping[str, Difference],
) -> list[ComparedRow]:
    adjusted = dict(zip(tested, holm([d.p for d in tested.values()]), strict=True))
    rows = []
    for kind in TASK_TYPES:
        names = sorted(name for name in scores if results[name].type == kind)
        for name in names:
            first, second = scores[name]
            test, p_holm = tested.get(name), adjusted.get(name)
            rows.append(
                ComparedRow(
                    kind="task",
                    name=name,
                    score_name=results[name].main_score_name,
                    first=first,
                    second=second,
                    difference=second - first,
                    low=test.low if test else None,
                    high=test.high if test else None,
                    p=test.p if test else None,
                    p_holm=p_holm,
                    significant=p_holm is not None and p_holm < SIGNIFICANT,
                )
            )
        if names:
            rows.append(_average("type", kind, names, scores, tested))
    if scores:
        rows.append(_average("all", "Average", list(scores), scores, tested))
    return rows


def _average(
    kind: Literal["type", "all"],
    label: str,
    names: Sequence[str],
    scores: Mapping[str, tuple[float, float]],
    tested: Mapping[str, Difference],
) -> ComparedRow:
    first, second = (float(np.mean([scores[name][side] for name in names])) for side in (0, 1))
    low = high = None
    if all(name in tested for name in names):
        _, low, high = mean_difference([tested[name] for name in names])
    differences_T = np.array([scores[name][1] - scores[name][0] for name in names])
    p = sign_flip_p(differences_T, resamples=100_000) if len(names) > 1 else None
    count = count_of_tasks(names)
    significant = p is not None and p < SIGNIFICANT
    return ComparedRow(
        kind, label, count, first, second, second - first, low, high, p, None, significant
    )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


# --- what people read -----------------------------------------------------------------------------

_EXPLANATION = (
    "Scores times 100. Difference: second less first, with its 95 % interval over the items of "
    "these tasks. p of a task: its own test, * below 0.05 after Holm's correction for all tasks. "
    "p of an average: over tasks, * below 0.05 (five tasks or fewer cannot reach it)."
)


def format_text(comparison: Comparison) -> str:
    """Render a comparison for a terminal."""
    rows = [(row.kind, row.name, _cells(row)) for row in comparison.rows]
    table = terminal_table(_titles(comparison), rows, width=120)
    return "\n".join([table, _EXPLANATION, *_note_lines(comparison)])


def format_markdown(comparison: Comparison) -> str:
    """Render a comparison as a Markdown table, averages in bold."""
    rows = [
        (row.kind, row.name, [cell.replace("*", "\\*") for cell in _cells(row)])
        for row in comparison.rows
    ]
    explanation = _EXPLANATION.replace("*", "\\*")
    table = markdown_table(_titles(comparison), rows)
    return "\n\n".join([table, explanation, *_note_lines(comparison)])


def format_json(comparison: Comparison) -> str:
    """Render a comparison as JSON, scores as they are (not times 100)."""
    return json.dumps(dataclasses.asdict(comparison), indent=2, ensure_ascii=False)


def _titles(comparison: Comparison) -> list[str]:
    return [comparison.first, comparison.second, "difference", "95 %", "p"]


def _note_lines(comparison: Comparison) -> list[str]:
    return [f"note: {note}" for note in comparison.notes]


def _cells(row: ComparedRow) -> list[str]:
    interval = (
        ""
        if row.low is None or row.high is None
        else (f"{100 * row.low:+.2f} … {100 * row.high:+.2f}")
    )
    p = "" if row.p is None else f"{row.p:.4f}{'*' if row.significant else ' '}".strip()
    return [
        row.score_name,
        f"{100 * row.first:.2f}",
        f"{100 * row.second:.2f}",
        f"{100 * row.difference:+.2f}",
        interval,
        p,
    ]
