"""A grid run for real: scores, skipping, a failing arm, a killed one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from nvembed.cli.main import run as run_command
from nvembed.core.config import dump_config
from nvembed.core.files import alone_in
from tiny_run import recipe, write_inputs


def write_grid(folder: Path, decoder: Path) -> Path:
    write_inputs(folder, decoder)
    config = recipe(decoder).model_copy(update={"evaluation": None})
    (folder / "recipe.yaml").write_text(dump_config(config), encoding="utf-8")
    grid = {
        "recipe": "recipe.yaml",
        "output": str(folder / "grid"),
        "axes": {
            "stages": {"two": {}, "single": {"stage_order": [1]}},
            "backbone": {"here": {}, "missing": {"model.backbone": str(folder / "nothing")}},
        },
        "leave_out": [{"stages": "single", "backbone": "missing"}],
        "seeds": [0],
        "tasks": ["task"],
    }
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(grid, sort_keys=False), encoding="utf-8")
    return path


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_killed_grid_goes_on_and_a_failing_arm_stops_no_other(
    tmp_path: Path, tiny_decoder_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = write_grid(tmp_path, tiny_decoder_dir)
    command = [sys.executable, "-m", "nvembed", "ablate", str(grid)]
    first = tmp_path / "grid" / "arms" / "two+here" / "seed-0"
    # Killed within the first arm: the process of the arm ends, too, and nothing is finished.
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    while not (first / "checkpoints" / "step-0000000002").exists():
        assert time.monotonic() < deadline, "no checkpoint"
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    while group_lives(process.pid):
        assert time.monotonic() < deadline, "the arm goes on without the grid"
        time.sleep(0.05)
    if (first / "outcome.json").exists():
        assert json.loads((first / "outcome.json").read_text("utf-8"))["state"] == "failed"

    # Another command is at work on one arm: it is passed over, then done by the next command.
    single = tmp_path / "grid" / "arms" / "single+here" / "seed-0"
    with alone_in(single) as alone:
        assert alone
        assert run_command(["ablate", str(grid)]) == 2
        shown = capsys.readouterr()
        assert "two+here seed 0: finished" in shown.out
        assert "single+here seed 0: open, another process is at work on it" in shown.out
        assert not list(single.iterdir())
    assert run_command(["ablate", str(grid)]) == 2
    shown = capsys.readouterr()
    assert "two+here" not in shown.out
    assert "single+here seed 0: finished" in shown.out
    assert "1 of 3 runs failed, the first is two+missing" in shown.err
    outcome = json.loads((first / "outcome.json").read_text("utf-8"))
    rows = [json.loads(line) for line in (first / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert outcome["tokens"] == sum(row["tokens"] for row in rows)
    assert len(rows) == 10
    assert not (first / "model").exists()
    assert (first / "results.items").is_dir()
    report = (tmp_path / "grid" / "report.md").read_text("utf-8")
    assert "## Failed runs" in report
    assert "nothing" in report

    # Once more: the finished ones are not touched, the failed one is tried again.
    before = (first / "results.json").stat().st_mtime_ns
    assert run_command(["ablate", str(grid)]) == 2
    assert "two+here" not in capsys.readouterr().out
    assert (first / "results.json").stat().st_mtime_ns == before

    # Other data, or other tasks, under the same names are refused, and nothing is lost.
    for file, name in (("pairs.jsonl", "data set pairs"), ("task/task.json", "task task")):
        content = (tmp_path / file).read_text("utf-8")
        (tmp_path / file).write_text(content.replace("red 0", "red 9") + " ", encoding="utf-8")
        assert run_command(["ablate", str(grid)]) == 2
        assert f"is finished, and changed since: {name}" in capsys.readouterr().err
        assert (first / "results.json").stat().st_mtime_ns == before
        (tmp_path / file).write_text(content, encoding="utf-8")

    # Another grid in the same folder is refused.
    assert run_command(["ablate", str(grid), "settings={model.max_tokens: 48}"]) == 2
    assert "was run with another configuration: model.max_tokens" in capsys.readouterr().err
    assert run_command(["ablate", str(grid), "--dry-run"]) == 0
    assert "two+missing seed 0: failed" in capsys.readouterr().out
