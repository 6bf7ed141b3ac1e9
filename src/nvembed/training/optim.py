"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import torch
from torch import nn

from nvembed.training.config import OptimizerConfig, StageConfig


def schedule(step: int, *, steps: int, warmup_steps: int) -> float:
    """Share of the peak learning rate at an update, counted from 0.

    Linear rise over the warm-up, linear fall to zero after it (paper: linear decay). The last
    update still moves: the line reaches zero at ``steps``, which is no update any more.
    """
    warmup_steps = min(warmup_steps, steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return (steps - step) / max(1, steps - warmup_steps)


def build_optimizer(
    head: nn.Module, model: nn.Module, stage: StageConfig, config: OptimizerConfig
) -> torch.optim.AdamW:
    """AdamW over everything that is trained; no weight decay on vectors and latents.

    Each parameter group remembers its peak rate as ``peak``.
    """
    in_head = {id(parameter) for parameter in head.parameters()}
    head_rate = stage.head_learning_rate or stage.learning_rate
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = head_rate if id(parameter) in in_head else stage.learning_rate
        decays = parameter.ndim > 1 and "latents" not in name and "embed_tokens" not in name
        groups.setdefault((rate, config.weight_decay if decays else 0.0), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": rate, "peak": rate, "weight_decay": decay}
            for (rate, decay), parameters in groups.items()
        ],
        betas=(config.beta1, config.beta2),
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set every group to its share of the peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
