"""Learning rates that a recipe leaves open, and the line about a loss that does not move."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from interruption import interrupt_after
from nvembed.core.config import load_config
from nvembed.core.errors import ConfigError, TrainingError
from nvembed.core.files import read_jsonl, write_jsonl
from nvembed.core.runs import RunFolder
from nvembed.model.backbone import add_lora
from nvembed.model.embedder import NVEmbed
from nvembed.model.settings import LoraSettings, fitting_rate, shown_rate
from nvembed.training.config import StageConfig, TrainConfig
from nvembed.training.dry_run import dry_run
from nvembed.training.forecast import print_dry_run
from nvembed.training.metrics import WINDOW, movement
from nvembed.training.run_folder import prepare_folder
from nvembed.training.stages import LossWatch, backbone_elements, peak_rate, with_rates
from nvembed.training.trainer import train
from tiny_run import DATASET, PAIRS

STAGE = {"steps": 2, "batch_size": 6, "warmup_steps": 1, "num_negatives": 1, "temperature": 0.1}


def recipe(folder: Path, decoder: Path, *rates: float | None, **changes: Any) -> TrainConfig:
    write_jsonl(folder / "pairs.jsonl", PAIRS)
    stages = [
        {"name": name, "in_batch_negatives": True, "learning_rate": rate, **STAGE}
        for name, rate in zip(("one", "two"), rates, strict=False)
    ]
    data = {
        "output": str(folder / "run"),
        "model": {"backbone": str(decoder), "max_tokens": 32, "pooling": {"kind": "mean"}},
        "lora": {"rank": 2},
        "datasets": [DATASET | {"stages": list(range(1, len(stages) + 1))}],
        "stages": stages,
        "precision": "float32",
        "memory_gb": 0.5,
    }
    return TrainConfig.model_validate({**data, **changes})


def kept_rates(folder: Path) -> list[float | None]:
    config = load_config(TrainConfig, folder / "run" / "config.yaml")
    return [stage.learning_rate for stage in config.stages]


@pytest.mark.parametrize(
    ("elements", "part", "rate"),
    [
        (7.11e9, "adapters", 2e-5),  # the paper's
        (134.5e6, "adapters", 5e-4),
        (134.5e6, "all", 1.5e-4),
        (6.0e6, "all", 2e-3),
        (1e4, "all", 2e-3),
        (6.0e6, "adapters", 2e-3),
        (7.11e9, "head", 1e-3),
        (1, "head", 1e-3),
    ],
)
def test_known_rates_are_met(elements: float, part: Any, rate: float) -> None:
    assert fitting_rate(int(elements), part) == rate


@pytest.mark.parametrize("part", ["adapters", "all"])
def test_between_them_the_logarithm_falls_evenly(part: Any) -> None:
    sizes = np.geomspace(20e6, 70e9, 12)
    rates = [fitting_rate(int(size), part) for size in sizes]
    falls = np.diff(np.log(rates)) / np.diff(np.log(sizes))
    assert rates[3] < 2e-3
    slope = -0.811 if part == "adapters" else -0.833
    for fall, low in zip(falls, rates[1:], strict=True):
        if low < (1.9e-3 if rates[0] < 2e-3 else 1e-3):
            assert fall == pytest.approx(slope, abs=0.07)  # two digits of the rate
    assert rates == sorted(rates, reverse=True)
    # Between two known sizes, by the formula.
    if part == "all":
        middle_size = math.sqrt(6.0e6 * 134.5e6)
        expected = math.sqrt(2e-3 * 1.5e-4)
        assert fitting_rate(int(middle_size), part) == pytest.approx(expected, rel=0.01)


def test_rates_are_shown_as_a_recipe_may_have_them() -> None:
    for rate, text in ((5e-4, "5e-4"), (1.5e-5, "1.5e-5"), (0.02, "2e-2"), (1.0, "1e0")):
        assert shown_rate(rate) == text
        assert float(text) == rate


def test_weights_are_counted_without_adapters(tiny_decoder_dir: Path) -> None:
    model = NVEmbed.from_pretrained(tiny_decoder_dir, device="cpu", pooling="mean")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert backbone_elements(model) == count
    add_lora(model.backbone, LoraSettings(rank=4, dora=True))
    assert sum(parameter.numel() for parameter in model.parameters()) > count
    assert backbone_elements(model) == count
    layer = nn.Linear(2, 2, bias=False)
    layer.weight = nn.Parameter(torch.zeros(50, dtype=torch.uint8), requires_grad=False)
    model.backbone.extra = layer
    assert backbone_elements(model) == count + 100  # 4 bits each


def test_a_run_settles_its_rates_and_keeps_them(
    tmp_path: Path, tiny_decoder_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    config = recipe(tmp_path, tiny_decoder_dir, None, None)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(TrainingError, match="interrupted"):
            train(config, base_dir=tmp_path)
    assert kept_rates(tmp_path) == [2e-3, 1.5e-3]
    said = capsys.readouterr().out
    line = "learning rate 2e-3 in one, 1.5e-3 in two: LoRA on 0.0 M parameters; fix with stages."
    assert line in said
    assert line in (tmp_path / "run" / "train.log").read_text()
    # A rule that has changed meanwhile changes nothing for a run that goes on.
    monkeypatch.setattr("nvembed.training.stages.fitting_rate", lambda *_: 1.0)
    train(config, base_dir=tmp_path)
    assert "learning rate" not in capsys.readouterr().out
    rows = [row for _, row in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    # One of two steps is warm-up, in each stage.
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-3, 2e-3, 7.5e-4, 1.5e-3])
    assert kept_rates(tmp_path) == [2e-3, 1.5e-3]
    train(config, base_dir=tmp_path)  # finished
    with pytest.raises(TrainingError, match=r"stages\.0\.learning_rate: 0\.002 → 0\.003"):
        train(with_rates(recipe(tmp_path, tiny_decoder_dir, 3e-3, None), []), base_dir=tmp_path)


def test_a_run_that_was_killed_before_its_model_was_there_settles_them(
    tmp_path: Path, tiny_decoder_dir: Path
) -> None:
    config = recipe(tmp_path, tiny_decoder_dir, None)
    prepare_folder(RunFolder(tmp_path / "run"), config, fresh=False)
    assert kept_rates(tmp_path) == [None]
    train(config, base_dir=tmp_path)
    assert kept_rates(tmp_path) == [2e-3]


def test_given_rates_stay_and_later_ones_follow_the_first(
    tmp_path: Path, tiny_decoder_dir: Path, capsys: Any
) -> None:
    train(recipe(tmp_path, tiny_decoder_dir, 1e-2, None), base_dir=tmp_path)
    assert kept_rates(tmp_path) == [1e-2, 7.5e-3]
    assert "learning rate 7.5e-3 in two: 0.75 of that of one; fix" in capsys.readouterr().out
    train(recipe(tmp_path, tiny_decoder_dir, None, 1e-5), base_dir=tmp_path, fresh=True)
    assert kept_rates(tmp_path) == [2e-3, 1e-5]
    assert "learning rate 2e-3 in one: LoRA on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"lora": None}, "2e-3 in one: all of"),
        (
            {
                "lora": None,
                "backbone": "freeze",
                "model": {"pooling": {"kind": "latent", "num_latents": 4, "num_heads": 2}},
            },
            "1e-3 in one: the head on",
        ),
    ],
)
def test_a_dry_run_shows_them(
    tmp_path: Path, tiny_decoder_dir: Path, capsys: Any, changes: Any, what: str
) -> None:
    backbone = {"backbone": str(tiny_decoder_dir), "max_tokens": 32, "pooling": {"kind": "mean"}}
    changes = {**changes, "model": {**backbone, **changes.get("model", {})}}
    found = dry_run(recipe(tmp_path, tiny_decoder_dir, None, **changes), base_dir=tmp_path)
    assert found.rates is not None
    assert what in found.rates
    assert not (tmp_path / "run").exists()
    print_dry_run(found)
    shown = capsys.readouterr().out
    assert f"Learning rate {what[:8]}" in " ".join(shown.split())
    cells = [line.split() for line in shown.splitlines() if line.startswith("learning rate")]
    assert cells == [["learning", "rate", what[:4]]]


def test_a_stage_that_is_not_settled_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"stages\.one\.learning_rate: the learning rate is not"):
        peak_rate(StageConfig(name="one", steps=1, in_batch_negatives=True))


# --- A loss that does not move --------------------------------------------------------------------


def simulated(seed: int, steps: int, *, fall: float, spread: float = 0.1) -> list[float]:
    """Losses around 4 that fall by a share in all, the more the later."""
    rng = np.random.default_rng(seed)
    means = 4 * (1 - fall * np.linspace(0, 1, steps))
    return list(means + rng.normal(0, spread, steps))


def told(
    losses: list[float],
    *,
    accuracy: float | None = 0.5,
    warmup: int = 50,
    start: int = 0,
    steps: int = 500,
) -> list[str]:
    stage = StageConfig(
        name="one", steps=steps, in_batch_negatives=True, warmup_steps=warmup, learning_rate=2e-5
    )
    watch = LossWatch(stage, start)
    rows = [{"loss": loss, "accuracy": accuracy} for loss in losses]
    return [line for row in rows if (line := watch.after(row)) is not None]


def test_a_loss_that_stands_still_is_told_once() -> None:
    lines = [told(simulated(seed, 300, fall=0.0)) for seed in range(50)]
    assert all(len(found) <= 1 for found in lines)
    assert sum(map(len, lines)) > 40  # a spread may look like a fall
    (line,) = told([4.0, 4.1] * 100)
    assert line == (
        "one: the loss has not moved in 60 steps (4.050 ± 0.053 → 4.050 ± 0.053, 10 steps each): "
        "the learning rate of 2e-5 may be too low; nvembed train RECIPE --find-rate tries others"
    )


def test_a_loss_that_falls_is_no_alarm() -> None:
    for seed in range(200):
        assert told(simulated(seed, 60, fall=0.3, spread=0.2)) == []
        # Little, but more than its spread.
        assert told(simulated(seed, 60, fall=0.04, spread=0.01)) == []
    # Learnt in the very first steps, so that spread is large and the fall is in it.
    assert told([4.0, 2.0, 1.0, *[0.9] * 97], warmup=0) == []


def test_a_loss_that_rises_is_told_as_such() -> None:
    (line,) = told(simulated(0, 300, fall=-2.0))
    assert "the loss has risen in 60 steps" in line
    assert "may be too high" in line


def test_a_loss_that_is_low_from_the_start_accuses_no_learning_rate() -> None:
    (line,) = told([0.04, 0.05] * 100, accuracy=0.96)
    assert line == (
        "one: the loss was low from the start and stays so (0.045 ± 0.005 → 0.045 ± 0.005, 10 "
        "steps each): 96% of the queries find their answer among those of a step; hard negatives "
        "leave more to learn (nvembed mine)"
    )
    # As many right answers, but it rises; too few right answers; a loss without answers.
    (line,) = told(simulated(0, 300, fall=-2.0), accuracy=0.96)
    assert "may be too high" in line
    for accuracy in (0.89, None):
        (line,) = told([0.04, 0.05] * 100, accuracy=accuracy)
        assert "has not moved" in line


def test_short_and_resumed_stages_are_not_judged() -> None:
    flat = [4.0, 4.1] * 10
    assert told(flat[: 2 * WINDOW - 1], warmup=0, steps=2 * WINDOW - 1) == []
    assert len(told(flat, warmup=0)) == 1
    assert told([4.0, 4.1] * 100, start=3) == []


def test_movement_at_its_bounds() -> None:
    first = [1.0, 1.2] * 5  # mean 1.1, standard error of the difference to its like 0.047
    assert movement([*first, *[x - 0.04 for x in first]]) == 0
    assert movement([*first, *[x - 0.06 for x in first]]) == -1  # a twentieth
    assert movement([*first, *[x + 0.06 for x in first]]) == 0
    assert movement([*first, *[x + 0.11 for x in first]]) == 1  # two standard errors
    assert movement([0.0] * 20) == 0


def test_the_line_is_printed_in_a_run(tmp_path: Path, tiny_decoder_dir: Path, capsys: Any) -> None:
    config = recipe(tmp_path, tiny_decoder_dir, 1e-9)
    (stage,) = config.stages
    still = config.model_copy(update={"stages": (stage.model_copy(update={"steps": 21}),)})
    train(still, base_dir=tmp_path)
    assert capsys.readouterr().out.count("one: the loss has not moved in 20 steps") == 1
