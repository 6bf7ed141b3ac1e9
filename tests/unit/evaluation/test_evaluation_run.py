from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from nvembed.core.errors import ConfigError, DataError, ModelError, UserError
from nvembed.evaluation import run
from nvembed.evaluation.bm25 import bm25_ndcg
from nvembed.evaluation.results import TaskResult, read_results
from nvembed.evaluation.tasks import LocalTask, load_task, load_tasks
from nvembed.inference.fake import HashEncoder
from task_folders import write_task


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    write_task(folder / "find", "Retrieval")
    write_task(folder / "order", "Reranking", instruction=None)
    write_task(folder / "similar", "STS")
    return folder


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace model and mteb by something instant; lists the tasks that were scored."""
    names: list[str] = []

    def score(task: LocalTask, encoder: Any) -> dict[str, float | None]:
        assert isinstance(encoder, HashEncoder)
        names.append(task.name)
        return {task.main_score: len(names) / 10, "other": None}

    module = type(run)("nvembed.evaluation.mteb_adapter")
    module.score = score  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "nvembed.evaluation.mteb_adapter", module)
    monkeypatch.setattr("nvembed.inference.load.load_encoder", lambda name, dtype: HashEncoder(8))
    return names


def test_bm25_scores_retrieval_only(tasks: Path) -> None:
    finished: list[str] = []
    results = run.evaluate_bm25(
        load_tasks([tasks]), on_result=lambda name, result: finished.append(name)
    )
    data: Any = load_task(tasks / "find").data
    assert list(results) == finished == ["find"]
    assert results["find"].main_score == bm25_ndcg(data)
    assert results["find"].type == "Retrieval"


def test_bm25_by_name_needs_no_model(tasks: Path, tmp_path: Path) -> None:
    output = tmp_path / "bm25.json"
    results = run.evaluate_folders("bm25", [tasks], output)
    assert read_results(output) == results
    assert json.loads((tmp_path / "bm25.run.json").read_text())["model"] == "bm25"
    with pytest.raises(DataError, match="BM25 has no score for any of these tasks"):
        run.evaluate_folders("bm25", [tasks], tmp_path / "none.json", names=["similar"])


def test_results_and_what_they_were_made_with(
    tasks: Path, tmp_path: Path, scored: list[str]
) -> None:
    output = tmp_path / "out" / "results.json"
    results = run.evaluate_folders("some-model", [tasks], output, dtype="bfloat16")
    assert scored == ["find", "order", "similar"]
    written = json.loads(output.read_text())
    assert written["order"] == {
        "type": "Reranking",
        "main_score_name": "map",
        "main_score": 0.2,
        "seconds": results["order"].seconds,
        "scores": {"map": 0.2, "other": None},
    }
    made = json.loads((tmp_path / "out" / "results.run.json").read_text())
    assert made["model"] == "some-model"
    assert made["dtype"] == "bfloat16"
    assert made["instructions"] == {
        "find": "Find what fits",
        "order": None,
        "similar": "Find what fits",
    }
    assert "mteb" in made["environment"]["packages"]


def test_finished_tasks_survive_a_crash_and_are_not_repeated(
    tasks: Path, tmp_path: Path, scored: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "results.json"
    original = run.write_results

    def stop_after_two(path: Path, results: dict[str, TaskResult]) -> None:
        original(path, results)
        if len(results) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(run, "write_results", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        run.evaluate_folders("m", [tasks], output)
    monkeypatch.setattr(run, "write_results", original)
    assert list(read_results(output)) == ["find", "order"]

    results = run.evaluate_folders("m", [tasks], output, resume=True)
    assert scored == ["find", "order", "similar"]
    assert [results[name].main_score for name in ("find", "order", "similar")] == [0.1, 0.2, 0.3]
    assert read_results(output) == results
    run.evaluate_folders("m", [tasks], output, resume=True)
    assert len(scored) == 3
    run.evaluate_folders("m", [tasks], output, names=["order"])
    assert scored[3:] == ["order"]
    assert list(read_results(output)) == ["order"]


def test_resume_keeps_models_apart(tasks: Path, tmp_path: Path, scored: list[str]) -> None:
    output = tmp_path / "results.json"
    run.evaluate_folders("first", [tasks], output, names=["find"], resume=True)
    with pytest.raises(ConfigError, match="holds results of 'first', not of 'second'"):
        run.evaluate_folders("second", [tasks], output, resume=True)
    assert scored == ["find"]
    run.evaluate_folders("first", [tasks], output, names=["order"], resume=True)
    assert list(read_results(output)) == ["find", "order"]
    made = json.loads((tmp_path / "results.run.json").read_text())
    assert made["instructions"] == {"find": "Find what fits", "order": None}
    (tmp_path / "results.run.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds results of None"):
        run.evaluate_folders("first", [tasks], output, resume=True)
    (tmp_path / "results.run.json").unlink()
    with pytest.raises(DataError, match=r"results\.run\.json: cannot read"):
        run.evaluate_folders("first", [tasks], output, resume=True)


def test_bad_input_is_told_before_any_model_is_loaded(tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        run.evaluate_folders("no-such-model", [tasks], tmp_path)
    with pytest.raises(DataError, match="no task called"):
        run.evaluate_folders("no-such-model", [tasks], tmp_path / "r.json", names=["x"])
    (tasks / "similar" / "test.jsonl").write_text("{\n")
    with pytest.raises(DataError, match=r"test\.jsonl:1: not valid JSON"):
        run.evaluate_folders("no-such-model", [tasks], tmp_path / "r.json")
    assert not list(tmp_path.glob("r*"))


def test_an_unknown_model_leaves_earlier_results_alone(tasks: Path, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    run.evaluate_folders("bm25", [tasks], output)
    before = output.read_text()
    with pytest.raises(ModelError):
        run.evaluate_folders("./no/such/model", [tasks], output)
    assert output.read_text() == before


def test_missing_mteb_is_a_user_error(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    original = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "mteb":
            raise ModuleNotFoundError("No module named 'mteb'", name="mteb")
        return original(name, *arguments, **options)

    monkeypatch.delitem(sys.modules, "nvembed.evaluation.mteb_adapter", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=r"needs the package 'mteb'.*nvembed\[eval\]"):
        run.evaluate(HashEncoder(8), load_tasks([tasks]))
