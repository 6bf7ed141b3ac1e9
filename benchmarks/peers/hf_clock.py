"""Clock and loss record of a run by transformers' ``Trainer``."""

from __future__ import annotations

import time
from typing import Any

from torch import nn
from transformers import TrainerCallback

# What every peer is told, so that it does what our recipe says and nothing besides.
COMMON = {
    "num_train_epochs": 1,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "optim": "adamw_torch_fused",
    "dataloader_drop_last": True,
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "seed": 0,
}


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Seconds from the end of one step to the end of the next."""

    def __init__(self) -> None:
        self._stamps: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._stamps = [time.perf_counter()]

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._stamps.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        return [b - a for a, b in zip(self._stamps, self._stamps[1:], strict=False)]


def record_losses(module: nn.Module) -> list[Any]:
    """Losses that the module returns from now on, as tensors: reading them would cost time."""
    losses: list[Any] = []

    def note(_: nn.Module, __: Any, output: Any) -> None:
        loss = getattr(output, "loss", output)
        losses.append(loss.detach().clone())

    module.register_forward_hook(note)
    return losses
