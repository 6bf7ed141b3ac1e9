"""A temperature that is learned: its logarithm is a parameter beside those of the model."""

from __future__ import annotations

import math

import torch
from torch import nn

from nvembed.training.config import StageConfig

MIN_TEMPERATURE = 0.005
"""A learned temperature goes no lower."""


def new_temperature(stage: StageConfig | None, device: torch.device) -> nn.Parameter | None:
    """Log τ to be learned, if the stage wants it."""
    if stage is None or not stage.learn_temperature:
        return None
    return nn.Parameter(torch.tensor(math.log(stage.temperature), device=device))


@torch.no_grad()
def bounded(log_temperature: nn.Parameter | None) -> float | None:
    """Keep a learned τ from running to zero, and return it."""
    if log_temperature is None:
        return None
    log_temperature.clamp_(min=math.log(MIN_TEMPERATURE))
    return float(log_temperature.exp())
