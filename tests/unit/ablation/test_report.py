"""The report shows the numbers of the runs, fails to overclaim, and needs no other file."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from nvembed.evaluation.results import TaskResult, write_results
from nvembed.training.ablation.grid import GridConfig, Run
from nvembed.training.ablation.report import make_report, write_report
from nvembed.training.ablation.runner import Outcome, write_outcome
from nvembed.training.config import TrainConfig

CONFIG = TrainConfig.model_validate(
    {
        "output": "run",
        "model": {"backbone": "x"},
        "datasets": [
            {"name": "a", "path": "a", "kind": "retrieval", "instruction": "find", "stages": [1]}
        ],
        "stages": [{"name": "one", "steps": 1, "in_batch_negatives": True}],
    }
)
SCORES = {"good": (0.60, 0.61, 0.59), "same": (0.50, 0.52, 0.51), "base": (0.51, 0.50, 0.52)}


def made(
    folder: Path, *, scores: Mapping[str, tuple[float, ...]] = SCORES
) -> tuple[GridConfig, list[Run]]:
    arms = [*scores, "broken"]
    config = GridConfig.model_validate(
        {
            "recipe": "r.yaml",
            "output": str(folder),
            "title": "A <b>title</b>",
            "axes": {"kind": {arm: {} for arm in arms}},
            "baseline": {"kind": "base"},
            "seeds": (0, 1, 2),
            "tasks": ("t",),
            "paper": [
                {"table": "procedure", "rows": {"base": "two_stage", "good": "reversed_two_stage"}}
            ],
        }
    )
    runs = []
    for arm in arms:
        for seed in config.seeds:
            run = Run(arm, seed, folder / "arms" / arm / f"seed-{seed}", CONFIG)
            run.folder.mkdir(parents=True)
            runs.append(run)
            if arm == "broken":
                write_outcome(run.folder, Outcome("failed", error="disk <full> | gone"))
                continue
            if seed >= len(scores[arm]):
                continue
            write_outcome(run.folder, Outcome("finished", None, 10.0 + seed, 5.0, 1000, 0.5))
            values = {"sts": scores[arm][seed] + 0.1, "ret": scores[arm][seed] - 0.1}
            kinds = {"sts": "STS", "ret": "Retrieval"}
            write_results(
                run.results,
                {n: TaskResult(kinds[n], "m", v, 1.0, {"m": v}) for n, v in values.items()},  # type: ignore[arg-type]
            )
    return config, runs


def test_numbers_of_the_tables(tmp_path: Path) -> None:
    report = make_report(*made(tmp_path))
    arms, paper, cost, failed = report.tables
    rows = {row[0]: row for row in arms.rows}
    assert arms.header[:5] == ("arm", "seeds", "mean of all tasks", "Retrieval", "STS")
    assert rows["good"][1:5] == ("3", "60.00 ± 1.00", "50.00 ± 1.00", "70.00 ± 1.00")
    assert rows["good"][5] == "+9.00 *"
    assert rows["same"][5] == "+0.00"
    assert rows["base"][5:] == ("baseline", "")
    assert rows["broken"][1:3] == ("0", "–")
    assert paper.rows == (
        ("base", "51.00", "+0.00", "72.31", "+0.00"),
        ("good", "60.00", "+9.00", "71.85", "-0.46"),
    )
    assert dict((row[0], row[1:]) for row in cost.rows)["base"] == ("1,000", "11", "5", "0.500")
    assert [row[:2] for row in failed.rows] == [("broken", str(seed)) for seed in range(3)]


def test_findings_name_what_stands_out_and_what_does_not(tmp_path: Path) -> None:
    findings = " ".join(make_report(*made(tmp_path)).findings)
    assert "9 of 12 runs are finished" in findings
    assert "move an arm's mean by 1.00" in findings
    assert "Two arms must differ by 2.00" in findings  # t of 6 degrees 2.447 · √(2/3)
    assert "better good; worse none; 1 of 2 cannot be told from it" in findings


def test_a_report_names_its_grid_and_counts_in_words(tmp_path: Path) -> None:
    config, runs = made(tmp_path / "masks", scores={"base": (0.5,), "good": (0.6,)})
    config = config.model_copy(
        update={"title": None, "seeds": (0,), "recipe": "recipes/small.yaml"}
    )
    report = make_report(config, [run for run in runs if run.arm == "base" and run.seed == 0])
    assert report.title == "masks: a grid of small"
    assert report.findings[0] == "1 of 1 run is finished: 1 arm, 1 seed each, 2 tasks."


def test_the_axis_of_scores_has_no_offset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **o: (drawn.append(f), save(f, *a, **o)))
    make_report(*made(tmp_path, scores={"good": (0.650001, 0.650002), "base": (0.65, 0.650001)}))
    axis = drawn[0].axes[0].yaxis
    assert axis.get_major_formatter().get_offset() == ""
    assert all(label.get_text().startswith(("64.99", "65.00")) for label in axis.get_ticklabels())


def test_one_seed_claims_nothing(tmp_path: Path) -> None:
    findings = make_report(*made(tmp_path, scores={"good": (0.9,), "base": (0.1,)})).findings
    assert "no difference can be told from chance" in findings[-1]


def test_files_hold_the_same_and_the_page_needs_nothing_else(tmp_path: Path) -> None:
    config, runs = made(tmp_path)
    path = write_report(config, runs)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "A &lt;b&gt;title" in page
    assert "disk &lt;full&gt;" in page
    assert re.findall(r"""(?:src|href)=['"](?!data:)""", page) == []
    assert "| good | 3 | 60.00 ± 1.00 |" in path.read_text("utf-8")
    assert "disk <full> \\| gone" in path.read_text("utf-8")
    with (tmp_path / "scores.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 18
    mean = np.mean([float(row["main_score"]) for row in rows if row["arm"] == "good"])
    assert mean == pytest.approx(0.6)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
