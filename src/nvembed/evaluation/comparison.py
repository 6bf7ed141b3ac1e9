"""Compares the results of two models, task by task and on average, and says what chance explains.

The table of a ``Comparison`` is text, Markdown or JSON. Neither torch nor mteb is needed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nvembed.core.errors import DataError
from nvembed.core.files import read_json_object
from nvembed.core.reporting import progress
from nvembed.evaluation import significance
from nvembed.evaluation.results import (
    RowKind,
    TaskResult,
    items_folder,
    lay_out,
    read_items,
    read_results,
    run_file,
    table_text,
)

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class ComparedRow:
    """One task, or the average of a type or of all tasks."""

    kind: RowKind
    name: str  # of the task or the type; ``Average`` of all
    score_name: str  # or over how many tasks an average is taken
    first: float
    second: float
    difference: float  # second less first
    low: float | None  # its 95 % interval, the tasks being these; ``None`` where items are missing
    high: float | None
    p: (
        float | None
    )  # a task's own test; for an average, over its tasks (two or more, signs flipped)
    p_holm: float | None  # p of a task, adjusted for the number of tasks tested
    significant: bool  # whether that is below 0.05; for averages, whether p is


@dataclass(frozen=True)
class Comparison:
    """What ``compare_results`` found."""

    first: str  # names of the models
    second: str
    rows: tuple[ComparedRow, ...]  # each type ends with its average; the last is that of all tasks
    notes: tuple[str, ...]  # what keeps it from comparing models alone, or from being tested


class _Side(NamedTuple):
    path: Path
    name: str
    results: dict[str, TaskResult]
    run: Mapping[str, Any]


def compare_results(
    first: str | Path, second: str | Path, *, resamples: int = significance.RESAMPLES
) -> Comparison:
    """Compare two models on the tasks that both have a score for.

    Args:
        first: results file of `nvembed evaluate`, or a folder with a ``results.json``.
        second: the same of the other model.
        resamples: how many every interval and drawn test is made of.

    Raises:
        DataError: a file is missing or damaged, or no task is in both.
    """
    one, two = _read_side(Path(first)), _read_side(Path(second))
    names = [name for name in one.results if name in two.results]
    if not names:
        own, other = (", ".join(list(side.results)[:3]) or "none" for side in (one, two))
        raise DataError(
            f"no task in common with {two.path}",
            where=str(one.path),
            expected="results on the same tasks",
            hint=f"One has {own}; the other {other}",
        )
    notes = _notes_on_runs(one, two, names)
    kept: dict[str, tuple[float, float]] = {}
    for name in names:
        a, b = one.results[name], two.results[name]
        if (a.type, a.main_score_name) != (b.type, b.main_score_name):
            notes.append(f"{name}: left out, the main scores differ")
        elif a.main_score is None or b.main_score is None:
            notes.append(f"{name}: left out, a score is undefined")
        else:
            kept[name] = a.main_score, b.main_score
    tested: dict[str, significance.Difference] = {}
    missing = []
    with progress(len(kept), "compare") as bar:
        for name in kept:
            items = [read_items(items_folder(side.path), name) for side in (one, two)]
            bar.advance()
            if items[0] is None or items[1] is None:
                missing.append(name)
            elif items[0].task_hash != items[1].task_hash:
                notes.append(f"{name}: not tested, the two were evaluated on different data")
            else:
                tested[name] = significance.compare_items(items[0], items[1], resamples=resamples)
    if missing:
        notes.append(
            f"only scores can be compared of {_listed(missing)}: there are no items. To have them, "
            "run `nvembed evaluate` again on these tasks, for both models"
        )
    rows = _rows(kept, {name: one.results[name] for name in kept}, tested)
    return Comparison(one.name, two.name, tuple(rows), tuple(notes))


def _read_side(path: Path) -> _Side:
    file = path / "results.json" if path.is_dir() else path
    results = read_results(file)
    record = run_file(file)
    run = read_json_object(record, "the record of an evaluation") if record.is_file() else {}
    return _Side(file, str(run.get("model") or path), results, run)


def _notes_on_runs(one: _Side, two: _Side, names: Sequence[str]) -> list[str]:
    """Say in what else than the model two evaluations differ."""
    notes = []
    runs = one.run, two.run
    told = [_object(run, "instructions") for run in runs]
    if all(told):
        other = [name for name in names if told[0].get(name) != told[1].get(name)]
        notes += [f"the instructions differ on {_listed(other)}"] if other else []
    for side in (one, two):
        if not side.run:
            notes.append(f"{side.path}: no record beside it of model, instructions and versions")
    if not all(runs):
        return notes
    if runs[0].get("model") == runs[1].get("model"):
        notes.append(f"both are results of {one.name}")
    for key in ("revision", "dtype"):
        if runs[0].get(key) != runs[1].get(key):
            notes.append(f"{key}: {runs[0].get(key)} and {runs[1].get(key)}")
    versions = [_object(_object(run, "environment"), "packages") for run in runs]
    differ = [name for name in versions[0] if versions[0][name] != versions[1].get(name)]
    notes += [f"evaluated with other versions of {_listed(differ)}"] if differ else []
    return notes


def _object(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = values.get(key)
    return value if isinstance(value, dict) else {}


def _rows(
    scores: Mapping[str, tuple[float, float]],
    results: Mapping[str, TaskResult],
    tested: Mapping[str, significance.Difference],
) -> list[ComparedRow]:
    adjusted = dict(
        zip(tested, significance.holm([test.p for test in tested.values()]), strict=True)
    )
    rows = []
    for kind, label, score_name, names in lay_out(results):
        scores_T2 = np.array([scores[name] for name in names])
        first, second = scores_T2.mean(axis=0).tolist()
        low = high = p = p_holm = None
        if kind == "task" and label in tested:
            test, p_holm = tested[label], adjusted[label]
            low, high, p = test.low, test.high, test.p
        elif kind != "task":
            if all(name in tested for name in names):
                _, low, high = significance.mean_difference([tested[name] for name in names])
            if len(names) > 1:
                p = significance.sign_flip_p(scores_T2[:, 1] - scores_T2[:, 0], resamples=100_000)
        decisive = p_holm if kind == "task" else p
        stands_out = decisive is not None and decisive < SIGNIFICANT
        scored = (first, second, second - first, low, high, p, p_holm)
        rows.append(ComparedRow(kind, label, score_name, *scored, significant=stands_out))
    return rows


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


# --- what people read -----------------------------------------------------------------------------

_EXPLANATION = (
    "Scores times 100. Difference: second less first, with its 95 % interval over the items of "
    "these tasks. p of a task: its own test, * below 0.05 after Holm's correction for all tasks. "
    "p of an average: over tasks, * below 0.05 (five tasks or fewer cannot reach it)."
)


def format_text(comparison: Comparison, *, markdown: bool = False) -> str:
    """Render a comparison for a terminal, or as Markdown with averages in bold."""

    def escaped(text: str) -> str:
        return text.replace("*", "\\*") if markdown else text

    titles = [comparison.first, comparison.second, "difference", "95 %", "p"]
    rows = [(row.kind, row.name, list(map(escaped, _cells(row)))) for row in comparison.rows]
    table = table_text(titles, rows, 120, markdown=markdown)
    notes = [f"note: {note}" for note in comparison.notes]
    return ("\n\n" if markdown else "\n").join([table, escaped(_EXPLANATION), *notes])


format_markdown = partial(format_text, markdown=True)


def format_json(comparison: Comparison) -> str:
    """Render a comparison as JSON, scores as they are (not times 100)."""
    return json.dumps(dataclasses.asdict(comparison), indent=2, ensure_ascii=False)


def _cells(row: ComparedRow) -> list[str]:
    interval = ""
    if row.low is not None and row.high is not None:
        interval = f"{100 * row.low:+.2f} … {100 * row.high:+.2f}"
    return [
        row.score_name,
        f"{100 * row.first:.2f}",
        f"{100 * row.second:.2f}",
        f"{100 * row.difference:+.2f}",
        interval,
        "" if row.p is None else f"{row.p:.4f}{'*' if row.significant else ''}",
    ]
