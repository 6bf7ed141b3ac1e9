"""``--find-rate``: its trainings are those of a run, its pick that of a grid; nothing is left."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from nvembed.cli.main import run
from nvembed.core.errors import ConfigError, TrainingError
from nvembed.core.files import read_jsonl, write_jsonl
from nvembed.training import find_rate as search
from nvembed.training import stages
from nvembed.training import trial as tried
from nvembed.training.config import TrainConfig
from nvembed.training.find_rate import RateSearch, Trial, find_rate, lines_of, next_place
from nvembed.training.trainer import train
from tiny_run import DATASET, PAIRS

STEPS = 12


def recipe(folder: Path, decoder: Path, rate: float | None, **changes: Any) -> TrainConfig:
    write_jsonl(folder / "pairs.jsonl", PAIRS)
    stage = {
        "name": "one",
        "steps": STEPS,
        "batch_size": 8,
        "warmup_steps": 2,
        "learning_rate": rate,
        "in_batch_negatives": True,
        "num_negatives": 0,
        "temperature": 0.1,
        "learn_temperature": True,
    }
    data = {
        "output": str(folder / "run"),
        "model": {"backbone": str(decoder), "max_tokens": 32, "pooling": {"kind": "mean"}},
        "lora": {"rank": 4, "dropout": 0.1},
        "datasets": [DATASET | {"stages": [1]}],
        "stages": [stage],
        "precision": "float32",
        "memory_gb": 0.5,
    }
    return TrainConfig.model_validate({**data, **changes})


def losses_of_run(folder: Path, decoder: Path, rate: float, **changes: Any) -> list[float]:
    output = str(folder / f"run-{rate}")
    train(recipe(folder, decoder, rate, output=output, **changes), base_dir=folder)
    return [row["loss"] for _, row in read_jsonl(Path(output) / "metrics.jsonl")]


def test_a_trial_is_the_run_with_that_rate(tmp_path: Path, tiny_decoder_dir: Path) -> None:
    config = recipe(tmp_path, tiny_decoder_dir, None)
    before = sorted(tmp_path.rglob("*"))
    found = find_rate(config, base_dir=tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    assert found.steps == STEPS
    assert found.stage.learning_rate == 2e-3  # that fits
    rates = [trial.rate for trial in found.trials]
    assert {3.2e-4, 8e-4, 2e-3, 5e-3, 1.3e-2} <= {*rates}
    assert rates == sorted(rates)
    # Not the first that was tried: all start from the same weights.
    trial = next(trial for trial in found.trials if trial.rate == 5e-3)
    expected = losses_of_run(tmp_path, tiny_decoder_dir, 5e-3)
    assert list(trial.losses) == pytest.approx(expected, rel=1e-6)
    assert trial.loss == pytest.approx(np.mean(expected[-3:]))


def test_a_teacher_and_mined_negatives_are_part_of_it(
    tmp_path: Path, tiny_decoder_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVEMBED_CACHE", str(tmp_path / "cache"))
    folder = train(recipe(tmp_path, tiny_decoder_dir, 1e-3), base_dir=tmp_path)
    parts: list[dict[str, float]] = []
    step = tried.TriedStage.step

    def noted(*arguments: Any, **options: Any) -> Any:
        result = step(*arguments, **options)
        parts.append(result.to_row()["parts"])
        return result

    monkeypatch.setattr(tried.TriedStage, "step", noted)
    monkeypatch.setattr(search, "_AROUND", (0,))
    monkeypatch.setattr(search, "_MOST_RATES", 1)
    (stage,) = recipe(tmp_path, tiny_decoder_dir, 1e-3).stages
    data = stage.model_dump(mode="json") | {
        "steps": 3,
        "num_negatives": 1,
        "teacher": {"model": str(folder), "vectors": 1.0},
        "mine": {"num_negatives": 1},
    }
    config = recipe(tmp_path, tiny_decoder_dir, 1e-3, stages=[data])
    (trial,) = find_rate(config, base_dir=tmp_path).trials
    assert len(trial.losses) == 3
    assert all({*found} >= {"contrastive", "similarities", "vectors"} for found in parts)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {"rank": 4, "dropout": 0.0}], ids=["full", "lora"])
@pytest.mark.parametrize("start", [1e-4, 2e-3])
def test_the_pick_is_near_the_best_of_a_grid(
    tmp_path: Path, tiny_decoder_dir: Path, lora: Any, start: float
) -> None:
    """From a rate that is far too low, too."""
    found = find_rate(recipe(tmp_path, tiny_decoder_dir, start, lora=lora), base_dir=tmp_path)
    grid = [1e-5 * 3**n for n in range(11)]
    ends = {}
    for rate in grid:
        try:
            losses = losses_of_run(tmp_path, tiny_decoder_dir, rate, lora=lora)
            ends[rate] = float(np.mean(losses[-3:]))
        except TrainingError:
            ends[rate] = math.inf
    best = min(ends, key=lambda rate: ends[rate])
    assert ends[grid[0]] > ends[best] * 1.2  # rates matter here
    assert 1 / 3.01 < found.best.rate / best < 3.01
    assert not found.is_open


def test_rates_are_tried_until_the_best_is_surrounded() -> None:
    def tried(loss_at: Any) -> list[int]:
        losses: dict[int, float] = {}
        while (place := next_place(losses)) is not None:
            losses[place] = loss_at(place)
        return [*losses]

    assert tried(abs) == [0, 1, -1, 2, -2]
    assert tried(lambda place: abs(place - 2)) == [0, 1, -1, 2, -2, 3]
    assert tried(lambda place: abs(place + 3)) == [0, 1, -1, 2, -2, -3, -4]
    assert tried(lambda place: -place) == [0, 1, -1, 2, -2, 3, 4, 5, 6]  # an end of it
    assert tried(lambda place: math.inf if place > 0 else -place) == [0, 1, -1, 2, -2]


def test_a_rate_that_diverges_is_never_the_best(
    tmp_path: Path, tiny_decoder_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = tried.contrastive_step
    rates: list[float] = []
    original = stages.build_optimizer

    def noted(*arguments: Any) -> Any:
        rates.append(arguments[2].learning_rate)
        return original(*arguments)

    def broken(*arguments: Any, **options: Any) -> Any:
        if rates[-1] > limit:
            raise FloatingPointError(math.nan)
        return step(*arguments, **options)

    monkeypatch.setattr(stages, "build_optimizer", noted)
    monkeypatch.setattr(tried, "contrastive_step", broken)
    limit = 1.1e-3
    found = find_rate(recipe(tmp_path, tiny_decoder_dir, 1e-3), base_dir=tmp_path)
    assert [trial.diverged for trial in found.trials if trial.rate > limit] == [True, True]
    assert found.best.rate <= limit
    assert sum("diverged" in line for line in lines_of(found)) == 2
    limit = 0.0
    monkeypatch.setattr(search._Search, "_steps_that_fit", lambda *_: 3)
    with pytest.raises(TrainingError, match=r"one: the loss is not finite at any rate from 1.6e-4"):
        find_rate(recipe(tmp_path, tiny_decoder_dir, 1e-3), base_dir=tmp_path)


def test_time_decides_how_many_steps_and_rates(
    tmp_path: Path, tiny_decoder_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe(tmp_path, tiny_decoder_dir, 1e-3)
    (stage,) = config.stages
    config = config.model_copy(update={"stages": (stage.model_copy(update={"steps": 100}),)})
    monkeypatch.setattr(search, "_FEWEST_STEPS", 2)
    clock = itertools.count(0, 1.0)
    monkeypatch.setattr(search.time, "monotonic", lambda: next(clock))
    # A step takes a second by this clock, and 25 s are 3.5 steps for each of seven rates.
    found = find_rate(config, base_dir=tmp_path, minutes=25 / 60)
    assert found.steps == 3
    assert len(found.trials) >= 5
    # With 8 s it is the fewest, and three rates are tried although they are over.
    found = find_rate(config, base_dir=tmp_path, minutes=8 / 60)
    assert found.steps == 2
    assert [trial.rate for trial in found.trials] == [4e-4, 1e-3, 2.5e-3]
    monkeypatch.setattr(search, "_FEWEST_RATES", 1)
    assert len(find_rate(config, base_dir=tmp_path, minutes=8 / 60).trials) == 2


def made_up(*losses: float) -> RateSearch:
    stage = TrainConfig.model_validate(
        {
            "output": "run",
            "model": {"backbone": "b"},
            "datasets": [DATASET | {"stages": [1]}],
            "stages": [
                {"name": "one", "steps": 9, "in_batch_negatives": True, "learning_rate": 1e-3}
            ],
        }
    ).stages[0]
    trials = tuple(Trial(1e-4 * 10**n, (9.0, 9.0, 9.0, loss)) for n, loss in enumerate(losses))
    return RateSearch(stage, 4, trials, 12.3)


def test_what_is_said() -> None:
    assert lines_of(made_up(3.0, 1.5, 2.0)) == [
        "one: 3 learning rates, 4 steps of 128 queries each, from the same start and with the same "
        "batches; 12 s",
        "learning rate  loss at the end",
        "         1e-4           3.0000",
        "         1e-3           1.5000  best, what the run would take",
        "         1e-2           2.0000",
        "stages.one.learning_rate=1e-3",
    ]
    *_, warning, pick = lines_of(made_up(3.0, 2.0, 1.0))
    assert warning.startswith("! a higher rate may be better")
    assert pick == "stages.one.learning_rate=1e-2"
    assert "! a lower rate" in lines_of(made_up(1.0, 2.0, 3.0))[-2]


@pytest.fixture
def written(tmp_path: Path, tiny_decoder_dir: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    config = recipe(tmp_path, tiny_decoder_dir, None, output="run")
    data = config.model_dump(mode="json", exclude_none=True)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    monkeypatch.setattr(search, "_AROUND", (0, 1, -1))
    monkeypatch.setattr(search, "_MOST_RATES", 3)
    return ["train", "recipe.yaml", "--find-rate"]


def test_the_command_and_its_picture(written: list[str], capsys: Any) -> None:
    assert run([*written, "--plot", "rates.png", "stages.0.steps=4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "learning rate  loss at the end"
    assert [line.split()[0] for line in lines[2:5]] == ["8e-4", "2e-3", "5e-3"]
    assert lines[-1].startswith("stages.one.learning_rate=")
    assert Path("rates.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not Path("run").exists()
    # The line can be given as it is.
    assert run(["train", "recipe.yaml", lines[-1], "stages.0.steps=1"]) == 0


def test_bad_ways_to_ask(written: list[str], capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine.png").write_text("my own")
    Path("pairs.png").hardlink_to("pairs.jsonl")
    for given, expected in (
        (["--plot", "mine.png"], "mine.png: is there already, and nvembed did not make it"),
        (["--plot", "pairs.png"], "output and input are the same file"),
        (["--plot", "rates.pdf"], "rates.pdf: is no name of a picture; expected NAME.png"),
        (["--dry-run"], "--find-rate: given together with --dry-run"),
    ):
        assert run([*written, *given]) == 2
        assert expected in capsys.readouterr().err
    assert run(["train", "recipe.yaml", "--plot", "new.png"]) == 2
    assert "--plot: draws what --find-rate finds" in capsys.readouterr().err
    assert Path("mine.png").read_text() == "my own"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(written) == 2
    assert "2 processes were started; expected one" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        find_rate(recipe(Path(), Path("none"), None), base_dir=Path())
