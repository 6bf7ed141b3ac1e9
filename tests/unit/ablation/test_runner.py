"""All arms of a grid compute in one type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nvembed.core.config import dump_config
from nvembed.core.files import write_text
from nvembed.training.ablation.grid import Run
from nvembed.training.ablation.runner import with_one_precision
from nvembed.training.config import TrainConfig
from tiny_run import recipe


def grid(folder: Path, **chosen: str) -> list[Run]:
    made = recipe(folder)
    return [
        Run(name, 0, folder / name, made.model_copy(update={"precision": precision}))
        for name, precision in chosen.items()
    ]


def begin(run: Run, precision: str) -> None:
    config: TrainConfig = run.config.model_copy(update={"precision": precision})
    write_text(run.folder / "config.yaml", dump_config(config))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    answers: list[str] = []
    monkeypatch.setattr("nvembed.kernels.machine.fastest_precision", lambda device: answers.pop(0))
    return answers


def types(runs: Any) -> list[str]:
    return [run.config.precision for run in runs]


def test_it_is_measured_once_for_all(tmp_path: Path, measured: list[str]) -> None:
    measured += ["bfloat16", "float32"]
    runs = grid(tmp_path, a="auto", b="float32", c="auto")
    assert types(with_one_precision(runs, runs)) == ["bfloat16", "float32", "bfloat16"]
    assert measured == ["float32"]


def test_a_grid_that_goes_on_keeps_its_type(tmp_path: Path, measured: list[str]) -> None:
    runs = grid(tmp_path, done="auto", fixed="bfloat16", open="auto")
    begin(runs[0], "float32")
    begin(runs[1], "bfloat16")
    assert types(with_one_precision(runs[1:], runs)) == ["bfloat16", "float32"]


def test_an_arm_that_was_begun_keeps_its_own(tmp_path: Path, measured: list[str]) -> None:
    runs = grid(tmp_path, first="auto", second="auto", third="auto")
    begin(runs[0], "float32")
    begin(runs[1], "bfloat16")
    assert types(with_one_precision(runs[1:], runs)) == ["bfloat16", "float32"]


def test_nothing_is_measured_where_all_is_said(tmp_path: Path, measured: list[str]) -> None:
    runs = grid(tmp_path, a="float32")
    assert types(with_one_precision(runs, runs)) == ["float32"]
