from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nvembed.core.errors import DataError
from nvembed.evaluation.results import (
    TaskResult,
    format_markdown,
    format_table,
    read_results,
    summary_rows,
    write_results,
)


def _result(kind: str, score: float | None, name: str = "accuracy") -> TaskResult:
    return TaskResult(kind, name, score, 1.0, {name: score})  # type: ignore[arg-type]


BASE = {
    "z-class": _result("Classification", 0.5),
    "sts": _result("STS", 0.25, "cosine_spearman"),
    "cran": _result("Retrieval", 0.3, "ndcg_at_10"),
    "a-class": _result("Classification", 0.7),
}
BM25 = {"cran": _result("Retrieval", 0.333, "ndcg_at_10")}
BROKEN = {**BASE, "sts": _result("STS", None, "cosine_spearman")}


def test_rows_are_by_type_with_averages() -> None:
    rows = summary_rows({"BM25": BM25, "base": BASE})
    assert [(row.kind, row.label, row.score_name) for row in rows] == [
        ("task", "cran", "ndcg_at_10"),
        ("type", "Retrieval", "1 task"),
        ("task", "a-class", "accuracy"),
        ("task", "z-class", "accuracy"),
        ("type", "Classification", "mean of 2 tasks"),
        ("task", "sts", "cosine_spearman"),
        ("type", "STS", "1 task"),
        ("all", "Average", "mean of 4 tasks"),
    ]
    assert [row.scores[1] for row in rows] == pytest.approx(
        [0.3, 0.3, 0.7, 0.5, 0.6, 0.25, 0.25, (0.3 + 0.7 + 0.5 + 0.25) / 4]
    )
    # An average over other tasks than its neighbour's would mislead: BM25 has none overall.
    assert [row.scores[0] for row in rows] == [0.333, 0.333, None, None, None, None, None, None]


def test_an_undefined_score_leaves_its_averages_out() -> None:
    rows = {row.label: row.scores for row in summary_rows({"base": BASE, "broken": BROKEN})}
    assert rows["sts"] == (0.25, None)
    assert rows["STS"] == (0.25, None)
    assert rows["Average"][1] is None
    assert rows["Classification"] == pytest.approx((0.6, 0.6))


def test_markdown() -> None:
    assert format_markdown({"BM25": BM25, "a|b": BASE}).split("\n") == [
        "| task | score | BM25 | a\\|b |",
        "|---|---|---:|---:|",
        "| cran | ndcg_at_10 | 33.30 | 30.00 |",
        "| **Retrieval** | **1 task** | **33.30** | **30.00** |",
        "| a-class | accuracy | – | 70.00 |",
        "| z-class | accuracy | – | 50.00 |",
        "| **Classification** | **mean of 2 tasks** | **–** | **60.00** |",
        "| sts | cosine_spearman | – | 25.00 |",
        "| **STS** | **1 task** | **–** | **25.00** |",
        "| **Average** | **mean of 4 tasks** | **–** | **43.75** |",
    ]


def test_table_for_the_terminal() -> None:
    text = format_table({"BM25": BM25, "runs/a/very/long/path/to/a/model": BASE})
    lines = text.split("\n")
    assert any("cran" in line and "33.30" in line and "30.00" in line for line in lines)
    assert any("Average" in line and "–" in line and "43.75" in line for line in lines)
    assert "\x1b" not in text
    assert "runs/a/" in text  # a long name is folded, not cut
    assert max(map(len, lines)) <= 100


def test_nothing_gives_an_empty_table() -> None:
    assert summary_rows({}) == []
    assert summary_rows({"m": {}}) == []
    assert "task" in format_table({"m": {}})


def test_results_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_results(path, BROKEN)
    assert read_results(path) == BROKEN
    assert "NaN" not in path.read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "the file holds list"),
        ("{", "not valid JSON"),
        ('{"a": {"type": "STS"}}', "not evaluation results"),
        ('{"a": 3}', "not evaluation results"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_results(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_results(tmp_path / "none.json")


def test_tables_need_neither_torch_nor_mteb() -> None:
    code = (
        "import sys, nvembed.evaluation.results;"
        "print([m for m in ('torch', 'mteb', 'scipy', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
