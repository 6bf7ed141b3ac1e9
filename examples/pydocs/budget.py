"""How many training steps fit into the time there is.

Enters: the seconds that are left and what a rehearsal measured. Leaves: the steps of both stages.
Steps and not minutes go into the configuration, so that the learning rate's schedule is known from
the start and an interrupted run goes on as if nothing had happened.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from nvembed.core.arguments import PrecisionChoice
from nvembed.core.runs import RunFolder
from pydocs.recipe import STAGES, Preset, Steps, demo_config

STAGE1_SHARE = 0.8
"""Of the training time."""

TRUST = 0.8
"""Share of the time that is planned with: real steps are longer than rehearsed ones. Measured: 224
and 36 steps planned for 456 seconds took 532."""


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one step, of either stage."""

    stage1: float
    stage2: float


def rehearse(
    *, backbone: str, preset: Preset, data: Path, seed: int, precision: PrecisionChoice
) -> StepTimes:
    """Train a few steps of both stages in a temporary folder and return what a step takes.

    The first step of a stage is left out: it allocates memory.
    """
    from nvembed.training.trainer import train

    steps, records = preset.rehearsed
    with tempfile.TemporaryDirectory(prefix="nvembed-demo-") as folder:
        config = demo_config(
            output=folder,
            backbone=backbone,
            steps=Steps(steps, steps),
            preset=preset,
            seed=seed,
            data=str(data.resolve()),
            max_records=records,
        )
        config = config.model_copy(update={"precision": precision})
        train(config, base_dir=Path(folder))
        rows = RunFolder(Path(folder)).read_metrics()
    first, second = (
        median([row["seconds"] for row in rows if row["stage"] == name][1:]) for name in STAGES
    )
    return StepTimes(first, second)


def plan_steps(seconds: float, times: StepTimes, least: int) -> Steps:
    """Share `seconds` of training among the stages, never below `least` steps each."""
    return Steps(
        stage1=max(least, int(seconds * STAGE1_SHARE / times.stage1)),
        stage2=max(least, int(seconds * (1 - STAGE1_SHARE) / times.stage2)),
    )


def training_seconds(
    left: float, *, evaluation: float, mining: float, searching: float, saving: float
) -> float:
    """Return what of the time `left` training may take.

    Args:
        left: seconds until the end.
        evaluation: seconds that evaluations after training will take.
        mining: seconds that mining will take.
        searching: seconds that the example searches after training will take.
        saving: seconds for loading, checkpoints, models and plots.
    """
    return TRUST * (left - evaluation - mining - searching - saving)
