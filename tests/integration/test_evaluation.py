"""From a model folder and task folders to a table, with a real (tiny, random) model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hash_encoder import HashEncoder
from nvembed.evaluation.results import format_table, read_results
from nvembed.evaluation.session import Settings, evaluate, evaluate_bm25, run_session
from nvembed.evaluation.task_files import TASK_TYPES
from nvembed.evaluation.tasks import load_tasks
from task_folders import write_task


def test_all_types_with_a_model_from_a_folder(tmp_path: Path, tiny_decoder_dir: Path) -> None:
    for kind in TASK_TYPES:
        write_task(tmp_path / "tasks" / kind.lower(), kind)
    output = tmp_path / "results.json"
    settings = Settings(str(tiny_decoder_dir), output)
    results = run_session(settings, load_tasks([tmp_path / "tasks"])).results
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
    # Measured with mteb 2.26. A mix-up of sides, labels or judgements would bring them to chance.
    assert {name: result.main_score for name, result in results.items()} == {
        "cisi": pytest.approx(0.166, abs=0.005),
        "trecqa": pytest.approx(0.576, abs=0.005),
        "stsb": pytest.approx(0.492, abs=0.005),
        "rqe": pytest.approx(0.548, abs=0.005),
        "emotion": pytest.approx(0.278, abs=0.02),
    }


@pytest.mark.slow
@pytest.mark.shared
def test_every_real_task(shared: Callable[[str], Path]) -> None:
    tasks = load_tasks([shared("data/tasks")])
    results = evaluate(HashEncoder(512), tasks)
    assert len(results) == 32
    assert all(result.main_score is not None for result in results.values())
    # A real model adds its encoding.
    assert sum(result.seconds for result in results.values()) < 300
