"""Steps that are tried in memory: a stage at its start, for a dry run or a search for a rate."""

from __future__ import annotations

import math

import torch

from nvembed.core.errors import TrainingError
from nvembed.core.runs import derive_seed
from nvembed.model.embedder import NVEmbed
from nvembed.training.checkpoint import trained_parameters
from nvembed.training.config import TrainConfig
from nvembed.training.contrastive_loss import new_temperature
from nvembed.training.distributed import DistributedContext
from nvembed.training.stages import DataLoader, PreparedBatch, Stage, start_stage
from nvembed.training.step import StepResult, contrastive_step
from nvembed.training.teacher import PROJECTION, new_projection


class TriedStage:
    """A stage of a run in one process that leaves nothing; its loader has its teacher already."""

    def __init__(
        self,
        model: NVEmbed,
        config: TrainConfig,
        number: int,
        loader: DataLoader,
        processes: DistributedContext,
        *,
        activation_budget: int,
    ) -> None:
        self.model, self.config, self.processes = model, config, processes
        # What the loss has besides the model.
        self.beside = {
            "log_temperature": new_temperature(loader.stage, processes.device),
            PROJECTION: new_projection(loader.teacher, model, seed=config.seed, stage=number),
        }
        self.stage: Stage = start_stage(
            config,
            number,
            loader,
            trained_parameters(model, **self.beside),
            head=model.pooling,
            activation_budget=activation_budget,
            checkpoint=None,
        )

    def step(self, number: int, prepared: PreparedBatch) -> StepResult:
        """A step with its update; a loss or gradient that is not finite is a FloatingPointError."""
        stage, (batch, texts) = self.stage, prepared
        try:
            result = contrastive_step(
                self.model,
                batch,
                texts,
                stage.settings,
                self.processes,
                seed=derive_seed(self.config.seed, "dropout", stage.config.name, number),
                **self.beside,
            )
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                "a step does not fit into memory",
                where=stage.config.name,
                hint="Lower memory_gb, pack_tokens or batch_size",
            ) from error
        # Waits for the device.
        most = self.config.optimizer.max_grad_norm
        norm = self.processes.clip_gradients(stage.trained.values(), most)
        if not math.isfinite(norm):
            raise FloatingPointError(norm)
        stage.optimizer.step()
        stage.optimizer.zero_grad()
        return result
