"""What a dry run finds: forecasts of the data, the steps and the memory of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from nvembed.training.checkpoint import Position
from nvembed.training.config import StageConfig, TrainConfig
from nvembed.training.model import ActivationBudget
from nvembed.training.stage_mining import PlannedMining
from nvembed.training.teacher import TeacherStandIn


@dataclass(frozen=True, slots=True)
class DataForecast:
    """A data set in a stage."""

    name: str
    kind: str
    queries: int
    share: float  # of the stage's slots, by the weights
    used: int  # slots that it fills in the steps of the stage
    negatives: float  # own ones drawn per query, mean
    without: float  # share of its queries that have none
    to_mine: bool  # they are mined first, and these are their stand-ins


@dataclass(frozen=True, slots=True)
class BatchForecast:
    """The steps of a stage, from a sample of its batches: means, and the ``most`` of any step."""

    sampled: int
    texts: float  # different ones
    most_texts: int
    tokens: float
    most_tokens: int
    full: float  # share of the texts that reach the limit of tokens, and are cut or just fit
    duplicates: float  # share of the texts that are embedded once for several places
    negatives: float  # effective ones per query
    recomputed: float  # share of the tokens that are embedded twice


@dataclass(frozen=True, slots=True)
class StageForecast:
    """A stage, or what is left of it; evaluations are those on the way and at its end."""

    config: StageConfig
    steps: int
    data: tuple[DataForecast, ...]
    mining: tuple[PlannedMining, ...]
    mining_seconds: float  # of all sets
    teacher: TeacherStandIn | None
    batches: BatchForecast
    evaluations: int
    seconds_per_step: float

    @property
    def seconds(self) -> float:
        """Of all steps, without what comes before them and evaluation."""
        return self.seconds_per_step * self.steps

    @property
    def teacher_seconds(self) -> float:
        """Of embedding what the teacher has not embedded yet."""
        return self.teacher.seconds if self.teacher else 0.0

    @property
    def tokens(self) -> float:
        """Of all steps."""
        return self.batches.tokens * self.steps


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """Bytes of one process; ``elements`` and ``trained`` are numbers of parameters."""

    elements: int
    trained: int
    graph: ActivationBudget
    peak: int  # most that model, optimizer and steps took, beyond what the process held before
    free: int  # on the device before the model was loaded


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a run would do; ``stages`` are those that are left."""

    config: TrainConfig  # with settled precision and learning rates
    position: Position
    resumed: Path | None  # the checkpoint it goes on from
    finished: bool
    replaces: bool  # an earlier run in the folder would be deleted
    device: str
    tasks: tuple[str, ...] = ()
    stages: tuple[StageForecast, ...] = ()
    memory: TrainingMemory | None = None
    rates: str | None = None  # what learning rates the recipe left open, and what they become

    @property
    def seconds(self) -> float:
        """Of steps and what comes before them."""
        before = sum(stage.mining_seconds + stage.teacher_seconds for stage in self.stages)
        return before + sum(stage.seconds for stage in self.stages)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the run would do, and its owner may not want; a line each."""
        found = []
        for stage in self.stages:
            name, batches = stage.config.name, stage.batches
            idle = [
                f"{row.name} ({row.without:.0%})" for row in stage.data if row.used and row.without
            ]
            alone = stage.config.contrastive is not None and not stage.config.in_batch_negatives
            if idle and alone:
                found.append(
                    f"{name}: there are queries without negatives, which teach nothing without "
                    f"in-batch negatives: {', '.join(idle)}"
                )
            if self.memory is not None and batches.recomputed:
                whole = batches.most_tokens * self.memory.graph.bytes_per_token
                found.append(
                    f"{name}: {batches.recomputed:.0%} of the tokens are embedded twice; with "
                    f"memory_gb={math.ceil(whole / 1e8) / 10:.1f} none would be"
                )
        if self.memory is not None and self.memory.peak > self.memory.free:
            needed, free = self.memory.peak / 1e9, self.memory.free / 1e9
            found.append(
                f"about {needed:.1f} GB are needed and {free:.1f} GB are free: lower memory_gb or "
                "pack_tokens, or train adapters"
            )
        return tuple(found)
