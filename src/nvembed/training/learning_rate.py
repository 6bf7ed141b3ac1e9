"""Learning rates: those that a recipe leaves open, and a look at whether the loss moves.

A run settles its rates when it starts, from the model that is loaded; they then stand in its
``config.yaml``, and a run that goes on takes them from there.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch

from nvembed.core.errors import ConfigError
from nvembed.model.embedder import NVEmbed
from nvembed.model.settings import TunedPart, fitting_rate, shown_rate
from nvembed.training.config import StageConfig, TrainConfig

LATER_SHARE = 0.75  # of the first stage's rate, as the paper has it: 1.5e-5 after 2e-5
WINDOW = 10  # steps at the beginning of a stage, and as many after its warm-up, that are compared
_LITTLE = 0.05  # of the loss: less is no movement


def tuned_part(config: TrainConfig) -> TunedPart:
    """What of the model a run trains."""
    if config.backbone == "freeze":
        return "head"
    return "all" if config.lora is None else "adapters"


def backbone_elements(model: NVEmbed) -> int:
    """Number of the backbone's weights, without those of adapters."""
    return sum(
        # Of 4 bits two lie in a byte.
        parameter.numel() * (2 if parameter.dtype is torch.uint8 else 1)
        for name, parameter in model.backbone.named_parameters()
        if "lora_" not in name
    )


def with_fitting_rates(config: TrainConfig, model: NVEmbed) -> tuple[TrainConfig, str | None]:
    """Give the stages without a learning rate one that fits; and a line that says so."""
    first, *later = config.stages
    if all(stage.learning_rate is not None for stage in config.stages):
        return config, None
    count = backbone_elements(model)
    part = tuned_part(config)
    rate = first.learning_rate or fitting_rate(count, part)
    after = float(f"{rate * LATER_SHARE:.1e}")
    rates = [rate, *(stage.learning_rate or after for stage in later)]
    settled = with_rates(config, rates)
    named = [
        f"{shown_rate(rate)} in {stage.name}"
        for stage, rate in zip(config.stages, rates, strict=True)
        if stage.learning_rate is None
    ]
    what = {"adapters": "LoRA on", "all": "all of", "head": "the head on"}[part]
    why = f"{what} {count / 1e6:.1f} M parameters"
    if first.learning_rate is not None:
        why = f"{LATER_SHARE} of that of {first.name}"
    line = f"learning rate {', '.join(named)}: {why}; fix with stages.NAME.learning_rate"
    return settled, line


def with_rates(config: TrainConfig, rates: Sequence[float | None]) -> TrainConfig:
    """The run with these rates in those of its stages that have none."""
    given = [*rates, *[None] * len(config.stages)]
    stages = tuple(
        stage.model_copy(update={"learning_rate": stage.learning_rate or rate})
        for stage, rate in zip(config.stages, given, strict=False)
    )
    return config.model_copy(update={"stages": stages})


def peak_rate(stage: StageConfig) -> float:
    """The learning rate of a stage of a run that has settled it."""
    if stage.learning_rate is None:
        raise ConfigError(
            "the learning rate is not settled",
            where=f"stages.{stage.name}.learning_rate",
            expected="a number",
        )
    return stage.learning_rate


class LossWatch:
    """Tells once, some steps after the warm-up, of a loss that has not moved, or has risen.

    A stage that ends before, or goes on in the middle, is not judged.
    """

    def __init__(self, stage: StageConfig, start: int) -> None:
        self.stage = stage
        self.due = None if start else max(stage.warmup_steps, WINDOW) + WINDOW
        self.losses: list[float] = []

    def after(self, loss: float) -> str | None:
        """Take the loss of the next step; a line where there is something to tell."""
        if self.due is None or len(self.losses) == self.due:
            return None
        self.losses.append(loss)
        if len(self.losses) < self.due:
            return None
        direction = movement(self.losses)
        if direction < 0:
            return None
        first, last = self.losses[:WINDOW], self.losses[-WINDOW:]
        what, why = ("has risen", "high") if direction else ("has not moved", "low")
        means = " → ".join(
            f"{statistics.fmean(part):.3f} ± {statistics.stdev(part):.3f}" for part in (first, last)
        )
        return (
            f"{self.stage.name}: the loss {what} in {self.due} steps ({means}, {WINDOW} steps "
            f"each): the learning rate of {shown_rate(peak_rate(self.stage))} may be too {why}; "
            "nvembed train RECIPE --find-rate tries others"
        )


def movement(losses: Sequence[float]) -> int:
    """Whether the last losses are below the first (-1), above them (1), or neither (0).

    They differ if their means do by two standard errors, or by a twentieth: what the spread hides
    is no alarm.
    """
    first, last = losses[:WINDOW], losses[-WINDOW:]
    mean, moved = statistics.fmean(first), statistics.fmean(last) - statistics.fmean(first)
    error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / WINDOW)
    if moved < 0:
        return -1 if -moved > min(2 * error, _LITTLE * abs(mean)) else 0
    return 1 if moved > max(2 * error, _LITTLE * abs(mean)) else 0
