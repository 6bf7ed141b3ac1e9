"""A stage at work: its batches, its optimizer, and what is the same in all its steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from nvembed.training.checkpoint import restore_optimizer
from nvembed.training.config import StageConfig, TrainConfig
from nvembed.training.feed import Feed
from nvembed.training.objective import stage_objective
from nvembed.training.optim import build_optimizer, training_weights
from nvembed.training.plan import StepSettings


@dataclass(frozen=True, slots=True)
class StageAtWork:
    """What a stage works with.

    Args:
        number: from 0.
        config: its part of the recipe.
        feed: its batches.
        settings: of its steps.
        trained: parameters by name.
        optimizer: of all of them.
    """

    number: int
    config: StageConfig
    feed: Feed
    settings: StepSettings
    trained: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer


def start_stage(
    config: TrainConfig,
    number: int,
    feed: Feed,
    trained: dict[str, nn.Parameter],
    *,
    head: nn.Module,
    graph_tokens: int,
    checkpoint: Path | None,
) -> StageAtWork:
    """Build the optimizer of a stage, or put it back as it was.

    Args:
        config: the run.
        number: of the stage, from 0.
        feed: its batches.
        trained: parameters by name.
        head: the pooling head, whose parameters have a rate of their own.
        graph_tokens: tokens whose graphs fit into memory.
        checkpoint: to go on from, of the same stage; ``None`` at its start.
    """
    stage = config.stages[number]
    optimizer = build_optimizer(trained, head, stage, config.optimizer)
    training_weights(optimizer)
    if checkpoint is not None:
        restore_optimizer(checkpoint, trained, optimizer)
    settings = StepSettings(
        objective=stage_objective(stage),
        coupled=stage.in_batch_negatives,
        pack_tokens=config.pack_tokens,
        graph_tokens=graph_tokens,
    )
    return StageAtWork(number, stage, feed, settings, trained, optimizer)
