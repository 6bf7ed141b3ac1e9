"""From a model folder and task folders to a table, with a real (tiny, random) model and mteb."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nvembed.evaluation.results import read_results
from nvembed.evaluation.run import evaluate, evaluate_bm25, evaluate_folders
from nvembed.evaluation.summary import format_table
from nvembed.evaluation.tasks import TASK_TYPES, load_tasks
from nvembed.inference.fake import HashEncoder
from task_folders import write_task


def test_all_types_with_a_model_from_a_folder(tmp_path: Path, tiny_decoder_dir: Path) -> None:
    for kind in TASK_TYPES:
        write_task(tmp_path / "tasks" / kind.lower(), kind)
    output = tmp_path / "results.json"
    results = evaluate_folders(str(tiny_decoder_dir), [tmp_path / "tasks"], output)
    assert read_results(output) == results
    assert {result.type for result in results.values()} == set(TASK_TYPES)
    assert all(result.main_score is not None for result in results.values())
    assert all(-1 <= (result.main_score or 0) <= 1 for result in results.values())
    bm25 = evaluate_bm25(load_tasks([tmp_path / "tasks"]))
    table = format_table({"BM25": bm25, "tiny": results})
    assert all(kind in table for kind in TASK_TYPES)


@pytest.mark.shared
def test_real_tasks_with_bags_of_words(shared: Callable[[str], Path]) -> None:
    names = ["cisi", "trecqa", "stsb", "rqe", "emotion"]
    tasks = load_tasks([shared("data/tasks")], names)
    results = evaluate(HashEncoder(1024), tasks)
    scores = {name: result.main_score or 0.0 for name, result in results.items()}
    # Measured 2026: words in common are worth this much; a mix-up of sides, labels or judgements
    # would bring them down to chance (0.03, 0.27, 0, 0.5, 0.25).
    assert scores["cisi"] > 0.15
    assert scores["trecqa"] > 0.5
    assert scores["stsb"] > 0.45
    assert scores["rqe"] > 0.52
    assert scores["emotion"] > 0.27


@pytest.mark.slow
@pytest.mark.shared
def test_every_real_task(shared: Callable[[str], Path]) -> None:
    tasks = load_tasks([shared("data/tasks")])
    results = evaluate(HashEncoder(512), tasks)
    assert len(results) == 32
    assert all(result.main_score is not None for result in results.values())
    # What mteb itself takes; a real model adds its encoding. 65 s on two slow cores.
    assert sum(result.seconds for result in results.values()) < 300
