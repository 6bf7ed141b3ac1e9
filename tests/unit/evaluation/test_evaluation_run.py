from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from hash_encoder import HashEncoder
from nvembed.cli.main import run as run_command
from nvembed.core.errors import DataError, ModelError, UserError
from nvembed.evaluation import session
from nvembed.evaluation.local_scores import score_bm25
from nvembed.evaluation.results import items_folder, read_items, read_results
from nvembed.evaluation.session import Settings, run_session
from nvembed.evaluation.tasks import load_task, load_tasks
from task_folders import write_task


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    write_task(folder / "find", "Retrieval")
    write_task(folder / "order", "Reranking", instruction=None)
    write_task(folder / "similar", "STS")
    return folder


def test_bm25_scores_retrieval_only(tasks: Path) -> None:
    results = session.evaluate_bm25(load_tasks([tasks]))
    task = load_task(tasks / "find")
    assert list(results) == ["find"]
    assert results["find"].main_score == pytest.approx(score_bm25(task).scores["ndcg_at_10"])
    assert results["find"].type == "Retrieval"


def test_bm25_by_name_needs_no_model_and_can_be_compared(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "bm25.json"
    assert run_command(["evaluate", "bm25", "--tasks", str(tasks), "--output", str(output)]) == 0
    assert read_results(output).keys() == {"find"}
    assert json.loads((tmp_path / "bm25.run.json").read_text())["model"] == "bm25"
    items = read_items(items_folder(output), "find")
    assert items is not None
    expected = score_bm25(load_task(tasks / "find")).items
    assert expected is not None
    assert items.arrays["values_N"].tolist() == expected.arrays["values_N"].tolist()
    capsys.readouterr()
    words = ["evaluate", "bm25", "--tasks", str(tasks / "similar"), "--output", str(output)]
    assert run_command(words) == 2
    assert "BM25 has no score for any of these tasks" in capsys.readouterr().err


def test_scores_are_those_of_each_task_in_order(tasks: Path) -> None:
    finished: list[str] = []
    found = load_tasks([tasks])
    results = session.evaluate(
        HashEncoder(64), found, on_result=lambda name, result: finished.append(name)
    )
    assert list(results) == finished == ["find", "order", "similar"]
    for task in found:
        expected, _ = session.score_task(task, HashEncoder(64))
        assert results[task.name].scores == expected.scores
        assert results[task.name].main_score == expected.scores[task.main_score]


def test_bad_input_is_told_before_any_model_is_loaded(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", "no/such-model", "--tasks", str(tasks)]
    assert run_command([*words, "--output", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    (tasks / "similar" / "test.jsonl").write_text("{\n")
    assert run_command([*words, "--output", str(tmp_path / "r.json")]) == 2
    assert "test.jsonl:1: not valid JSON" in capsys.readouterr().err
    assert not list(tmp_path.glob("r*"))
    with pytest.raises(DataError, match="no task called"):
        load_tasks([tasks], ["x"])


def test_an_unknown_model_leaves_earlier_results_alone(tasks: Path, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    found = load_tasks([tasks], ["find"])
    run_session(Settings("bm25", output), found)
    before = output.read_text()
    with pytest.raises(ModelError):
        run_session(Settings("./no/such/model", output), found, resume=False)
    assert output.read_text() == before


def test_missing_libraries_are_a_user_error(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "sklearn":
            raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
        return original(name, *arguments, **options)

    for name in [n for n in sys.modules if n.startswith("nvembed.evaluation.")]:
        if name.partition("evaluation.")[2].partition(".")[0] in ("local_scores", "metrics"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=r"needs the package 'sklearn'.*nvembed\[eval\]"):
        session.evaluate(HashEncoder(8), load_tasks([tasks]))
