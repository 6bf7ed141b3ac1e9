"""What the demo tells its user in the end: the table, example searches, and what to type next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from nvembed.evaluation.results import TaskResult
from pydocs.dataset import SEARCHED, TASK_NAMES

Results = Mapping[str, Mapping[str, TaskResult]]
"""Model → task → result."""

COLUMNS = ("retrieval\nnDCG@10", "classification\naccuracy", "clustering\nV-measure")


def main_scores(results: Results) -> dict[str, list[float | None]]:
    """Return model → main score of each task in the order of `COLUMNS`; None where it has none."""
    return {
        model: [found[name].main_score if name in found else None for name in TASK_NAMES]
        for model, found in results.items()
    }


def score_table(results: Results) -> Table:
    """Lay out the main scores, one row a model, the best of a column in bold."""
    rows = main_scores(results)
    table = Table(title="Documentation of held-out modules", title_justify="left")
    table.add_column("model", vertical="bottom")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    best = [
        max((row[place] or 0.0 for row in rows.values()), default=0.0)
        for place in range(len(COLUMNS))
    ]
    for model, row in rows.items():
        cells = [
            "–"
            if score is None
            else f"[bold]{score:.3f}[/bold]"
            if score == top
            else f"{score:.3f}"
            for score, top in zip(row, best, strict=True)
        ]
        table.add_row(model, *cells)
    return table


def next_commands(output: Path) -> list[tuple[str, str]]:
    """Return (what it does, command) of what a user may want to do now."""
    folder = shlex.quote(str(output))
    return [
        (
            "search the documentation again",
            f'nvembed search {folder}/model "rotate an image" --documents {folder}/data/{SEARCHED}',
        ),
        (
            "search your own Python",
            "PYTHONPATH=examples python -m pydocs.own path/to/your/code my-docs.jsonl\n"
            f'nvembed search {folder}/model "read the settings" --documents my-docs.jsonl',
        ),
        ("train longer", f"python examples/pydocs --minutes 60 --output {folder}-60"),
        (
            "start from another decoder",
            f"python examples/pydocs --backbone HuggingFaceTB/SmolLM2-135M --minutes 120 "
            f"--output {folder}-smollm2",
        ),
        (
            "train on your own data",
            "nvembed train recipes/demo.yaml   # a recipe to copy; this goes to runs/demo-recipe",
        ),
    ]
