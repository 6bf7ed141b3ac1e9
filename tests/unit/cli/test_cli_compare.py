"""``nvembed compare`` on made results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nvembed.cli.main import run
from nvembed.core.files import write_json
from nvembed.evaluation.results import Items, TaskResult, items_folder, write_items, write_results

QUERIES = 60


def write_side(
    path: Path, gains: dict[str, float], *, items: bool = True, **record: Any
) -> dict[str, np.ndarray]:
    """Results whose tasks' scores are equal noise plus a gain each."""
    results, values = {}, {}
    for number, (name, gain) in enumerate(gains.items()):
        shared = np.random.default_rng(number).uniform(0.2, 0.6, size=QUERIES)
        own = np.random.default_rng([number, len(path.stem)]).normal(0, 0.05, size=QUERIES)
        values[name] = shared + own + gain
        score = float(values[name].mean())
        results[name] = TaskResult("Retrieval", "ndcg_at_10", score, 1.0, {"ndcg_at_10": score})
        if items:
            held = Items("values", "ndcg_at_10", f"hash of {name}", {"values_N": values[name]})
            write_items(items_folder(path), name, held)
    write_results(path, results)
    known = {"model": path.stem, "instructions": dict.fromkeys(gains, "find"), **record}
    write_json(path.with_name(f"{path.stem}.run.json"), known)
    return values


def compared(capsys: Any, *arguments: str) -> Any:
    assert run(["compare", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def failing(capsys: Any, *arguments: str) -> str:
    assert run(["compare", *arguments]) == 2
    error: str = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_a_gain_is_found_and_noise_is_not(tmp_path: Path, capsys: Any) -> None:
    one, two = tmp_path / "base.json", tmp_path / "tuned.json"
    first = write_side(one, {"same": 0.0, "better": 0.0, "worse": 0.0, "other": 0.0})
    second = write_side(two, {"same": 0.0, "better": 0.1, "worse": -0.1})
    found = compared(capsys, str(one), str(two))
    assert (found["first"], found["second"]) == ("base", "tuned")
    assert found["notes"] == []
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["better", "same", "worse", "Retrieval", "Average"]
    for name in ("better", "same", "worse"):
        expected = second[name].mean() - first[name].mean()
        assert rows[name]["difference"] == pytest.approx(expected)
        assert rows[name]["low"] < expected < rows[name]["high"]
        assert rows[name]["p_holm"] >= rows[name]["p"]
    assert rows["better"]["significant"]
    assert rows["worse"]["significant"]
    assert not rows["same"]["significant"]
    assert rows["same"]["low"] < 0 < rows["same"]["high"]
    average = rows["Average"]
    mean = np.mean([rows[name]["difference"] for name in ("better", "same", "worse")])
    assert average["difference"] == pytest.approx(mean)
    assert average["p"] >= 0.25  # two of eight flips are as far from 0, with three tasks
    assert not average["significant"]
    assert compared(capsys, str(one), str(two)) == found  # nothing is left to chance


def test_text_and_markdown(tmp_path: Path, capsys: Any) -> None:
    one, two = tmp_path / "base.json", tmp_path / "tuned.json"
    values = write_side(one, {"a|b": 0.0}), write_side(two, {"a|b": 0.2})
    assert run(["compare", str(one), str(two)]) == 0
    text = capsys.readouterr().out
    scores = [f"{100 * side['a|b'].mean():.2f}" for side in values]
    assert all(score in text for score in scores)
    assert "0.0005*" in text  # the smallest p of 2,000 resamples, and its mark
    assert run(["compare", str(one), str(two), "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| task | score | base | tuned | difference | 95 % | p |"
    assert lines[2].startswith(f"| a\\|b | ndcg_at_10 | {scores[0]} | {scores[1]} | +")
    assert lines[2].endswith("0.0005\\* |")
    assert lines[4].startswith("| **Average** | **1 task** |")


def test_folders_and_what_else_differs_is_said(tmp_path: Path, capsys: Any) -> None:
    for name, task in (("one", "find"), ("second", "search")):
        (tmp_path / name).mkdir()
        write_side(
            tmp_path / name / "results.json",
            {"t": 0.0, "u": 0.0},
            model=name,
            instructions={"t": task, "u": "find"},
            dtype=None if name == "one" else "bfloat16",
            environment={"packages": {"torch": name, "mteb": "2"}},
        )
    found = compared(capsys, str(tmp_path / "one"), str(tmp_path / "second"))
    assert found["first"] == "one"
    assert found["notes"] == [
        "the instructions differ on t",
        "dtype: None and bfloat16",
        "evaluated with other versions of torch",
    ]


def test_without_items_scores_are_compared(tmp_path: Path, capsys: Any) -> None:
    one, two = tmp_path / "base.json", tmp_path / "tuned.json"
    write_side(one, {"t": 0.0, "u": 0.0})
    write_side(two, {"t": 0.1, "u": 0.1}, items=False)
    two.with_name("tuned.run.json").unlink()
    found = compared(capsys, str(one), str(two))
    assert found["rows"][0]["p"] is found["rows"][0]["low"] is None
    assert found["rows"][-1]["low"] is None
    assert found["rows"][-1]["p"] == 0.5  # over two tasks
    assert "only scores can be compared of t, u" in found["notes"][-1]
    assert "run `nvembed evaluate` again" in found["notes"][-1]
    assert "no record" in found["notes"][0]


def test_other_data_is_not_tested(tmp_path: Path, capsys: Any) -> None:
    one, two = tmp_path / "base.json", tmp_path / "tuned.json"
    write_side(one, {"t": 0.0})
    write_side(two, {"t": 0.1})
    other = Items("values", "ndcg_at_10", "newer", {"values_N": np.zeros(QUERIES)})
    write_items(items_folder(two), "t", other)
    found = compared(capsys, str(one), str(two))
    assert found["rows"][0]["p"] is None
    assert found["notes"] == ["t: not tested, the two were evaluated on different data"]


def test_undefined_and_other_scores_are_left_out(tmp_path: Path, capsys: Any) -> None:
    one, two = tmp_path / "base.json", tmp_path / "tuned.json"
    for path, score, name in ((one, None, "map"), (two, 0.5, "mrr")):
        write_results(
            path,
            {
                "t": TaskResult("STS", "spearman", score, 1.0, {"spearman": score}),
                "u": TaskResult("Reranking", name, 0.5, 1.0, {name: 0.5}),
            },
        )
    found = compared(capsys, str(one), str(two))
    assert found["rows"] == []
    assert "t: left out, a score is undefined" in found["notes"]
    assert "u: left out, the main scores differ" in found["notes"]


def test_user_errors(tmp_path: Path, capsys: Any) -> None:
    one, two = tmp_path / "base.json", tmp_path / "tuned.json"
    write_side(one, {"t": 0.0})
    write_side(two, {"u": 0.0})
    error = failing(capsys, str(one), str(two))
    assert "no task in common" in error
    assert "One has t; the other u" in error
    assert "missing.json" in failing(capsys, str(one), str(tmp_path / "missing.json"))
    assert "--json" in failing(capsys, str(one), str(one), "--markdown", "--json")
    assert "--resamples" in failing(capsys, str(one), str(one), "--resamples", "5")
    (items_folder(one) / "t.npz").write_bytes(b"broken")
    assert "evaluate the task again" in failing(capsys, str(one), str(one))
