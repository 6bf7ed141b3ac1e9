"""Trackers get the numbers of every row, at its step, and go on after a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from nvembed.core.errors import ConfigError
from nvembed.core.runs import RunFolder
from nvembed.training import metrics
from nvembed.training.metrics import start_trackers, track, tracker_options

ROW = {
    "step": 3,
    "stage": "one",
    "loss": 0.5,
    "margin": None,
    "grad_norm": float("inf"),
    "texts": 7,
    "evaluation": {"tasks": {"a": 0.25, "b": None}, "mean": 0.25, "best": True},
}
NUMBERS = {"loss": 0.5, "texts": 7, "evaluation/tasks/a": 0.25, "evaluation/mean": 0.25}


def make_run(path: Path) -> RunFolder:
    run = RunFolder(path)
    run.create("seed: 0\n")
    return run


class Noted(GeneralTracker):
    name = "noted"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, Any]]] = []

    @property
    def tracker(self) -> None:
        return None

    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        self.rows.append((step, values))


def test_numbers_go_out_and_nothing_else(tmp_path: Path) -> None:
    tracker = Noted()
    accelerator = Accelerator(log_with=tracker)
    start_trackers(accelerator, make_run(tmp_path / "run"), {"seed": 0}, step=0)
    track(accelerator, ROW)
    accelerator.end_training()
    assert tracker.rows == [(3, NUMBERS)]


def test_no_trackers_are_no_options(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    accelerator = Accelerator(**tracker_options((), run))
    start_trackers(accelerator, run, {}, step=0)
    track(accelerator, ROW)
    assert not (run.path / "tensorboard").exists()


@pytest.mark.parametrize(
    ("kind", "install"),
    [("tensorboard", r"'nvembed\[trackers\]'"), ("wandb", "wandb"), ("trackio", "trackio")],
)
def test_a_missing_package_is_told(tmp_path: Path, monkeypatch, kind: str, install: str) -> None:
    monkeypatch.setattr(metrics.utils, f"is_{kind}_available", lambda: False)
    with pytest.raises(
        ConfigError, match=f"trackers: the tracker {kind} needs .* pip install {install}$"
    ):
        tracker_options((kind,), RunFolder(tmp_path))


def test_a_run_keeps_its_identity_until_it_is_started_over(tmp_path: Path, monkeypatch) -> None:
    """Weights & Biases and trackio are told who the run is; they are not asked here."""
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(
        Accelerator, "init_trackers", lambda self, project, init_kwargs: told.append(init_kwargs)
    )
    run = make_run(tmp_path / "run")
    for step in (0, 5):
        start_trackers(Accelerator(), run, {"seed": 0}, step=step)
    run.env.write_text('{"started": "another time"}')
    start_trackers(Accelerator(), run, {"seed": 0}, step=0)
    first, resumed, over = (options["wandb"] for options in told)
    assert first == resumed
    assert first["id"] != over["id"]
    assert first["name"] == "run"
    assert first["config"] == {"seed": 0}
    assert [options["tensorboard"] for options in told] == [{}, {"purge_step": 6}, {}]


@pytest.mark.filterwarnings("ignore")  # of protobuf
def test_tensorboard_goes_on_in_the_same_folder(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = make_run(tmp_path / "run")
    for start, last in ((0, 5), (3, 6)):  # stopped after step 5, gone on from a checkpoint of 3
        accelerator = Accelerator(**tracker_options(("tensorboard",), run))
        start_trackers(accelerator, run, {}, step=start)
        for step in range(start + 1, last + 1):
            track(accelerator, {**ROW, "step": step, "loss": step + start / 10})
        accelerator.end_training()
    folder = run.path / "tensorboard" / "nvembed"
    events = EventAccumulator(str(folder))
    events.Reload()
    assert set(events.Tags()["scalars"]) == NUMBERS.keys()
    assert [(event.step, round(event.value, 4)) for event in events.Scalars("loss")] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.3), (5, 5.3), (6, 6.3)
    ]  # fmt: skip
    run.create("seed: 0\n", replace=True)
    assert not folder.exists()
