"""Finished arms whose data or tasks changed are refused, without training anything."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from nvembed.core.cache import digest_of
from nvembed.core.config import dump_config, load_config
from nvembed.core.errors import ConfigError
from nvembed.core.files import write_json, write_jsonl
from nvembed.core.runs import RunFolder
from nvembed.training.ablation.grid import GridConfig, Run, grid_runs
from nvembed.training.ablation.runner import GridJob, Outcome, read_outcome, run_grid, write_outcome
from nvembed.training.run_folder import read_inputs_of
from task_folders import write_task
from tiny_run import PAIRS, recipe, write_inputs


@pytest.fixture
def runs(tmp_path: Path, tiny_decoder_dir: Path) -> list[Run]:
    """Two arms of two seeds, all finished."""
    shutil.copytree(tiny_decoder_dir, tmp_path / "decoder")
    write_inputs(tmp_path, Path("decoder"))
    write_task(tmp_path / "scored" / "sts", "STS")
    (tmp_path / "recipe.yaml").write_text(dump_config(recipe(Path("decoder"))), encoding="utf-8")
    grid = {
        "recipe": "recipe.yaml",
        "output": str(tmp_path / "grid"),
        "axes": {"steps": {"some": {}, "more": {"stages.one.steps": 6}}},
        "seeds": [0, 1],
        "tasks": ["scored"],
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid), encoding="utf-8")
    made = grid_runs(load_config(GridConfig, tmp_path / "grid.yaml"), tmp_path)
    for run in made:
        folder = RunFolder(run.folder)
        folder.create(dump_config(run.config))
        write_json(folder.inputs, read_inputs_of(run.config, tmp_path))
        tasks = {"sts": digest_of(tmp_path / "scored" / "sts")}
        write_outcome(run.folder, Outcome("finished", tokens=5, tasks=tasks))
    return made


def _again(runs: list[Run], folder: Path) -> list[Outcome]:
    return run_grid(runs, GridJob(folder, [folder / "scored"]))


def test_nothing_changed(runs: list[Run], tmp_path: Path) -> None:
    assert [outcome.tokens for outcome in _again(runs, tmp_path)] == [5] * 4


def _append(file: Path) -> None:
    file.write_text(file.read_text("utf-8") + " ", encoding="utf-8")


@pytest.mark.parametrize("what", ["data set pairs", "evaluation task task", "task sts"])
def test_changes_are_refused(runs: list[Run], tmp_path: Path, what: str) -> None:
    match what:
        case "data set pairs":
            write_jsonl(tmp_path / "pairs.jsonl", PAIRS[1:])
        case "evaluation task task":
            _append(tmp_path / "task" / "task.json")
        case _:
            _append(tmp_path / "scored" / "sts" / "task.json")
    with pytest.raises(ConfigError) as caught:
        _again(runs, tmp_path)
    message = f"arm {runs[0].arm} with seed 0 is finished, and changed since: {what}. Choose"
    assert message in str(caught.value)
    assert [read_outcome(run).state for run in runs] == ["finished"] * 4


def test_outcomes_of_earlier_versions_are_taken(runs: list[Run], tmp_path: Path) -> None:
    for run in runs:
        write_outcome(run.folder, Outcome("finished", tokens=7))
        RunFolder(run.folder).inputs.unlink()
    write_jsonl(tmp_path / "pairs.jsonl", PAIRS[1:])
    assert [outcome.tokens for outcome in _again(runs, tmp_path)] == [7] * 4


@pytest.mark.parametrize("content", ["[]", '{"state": "foreign"}', '{"state": "finished", "x": 1}'])
def test_a_damaged_outcome_is_an_open_run(runs: list[Run], content: str) -> None:
    (runs[0].folder / "outcome.json").write_text(content)
    assert read_outcome(runs[0]).state == "open"
