"""What a dry run finds: plain numbers, and how the memory of a step adds up.

    weights         counted
    gradients       of the trained parameters, as large as they are
    optimizer       two more numbers for each of them; of adamw_8bit one byte per number
    graphs          tokens held between forward and backward times what was measured per token
    one pack        values and gradients at the fullest point of one layer; see ``model/memory.py``
    loss            scores of a piece: a few copies in float32

What the steps of the dry run took is measured besides: the allocator of a CPU keeps more than it
was asked for, and the larger number counts. Python and its libraries come on top.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from nvembed.model.attention import short_tokens
from nvembed.model.embedder import NVEmbed
from nvembed.model.memory import Shape, activation_bytes, weight_bytes
from nvembed.training.checkpoint import Position, trained_parameters
from nvembed.training.config import OptimizerKind, StageConfig, TrainConfig
from nvembed.training.contrastive_loss import PIECE_SCORES
from nvembed.training.model import ActivationBudget

# bitsandbytes: smaller tensors keep their moments in float32, larger ones a scale per block.
_EIGHT_BIT_FROM, _EIGHT_BIT_BLOCK = 4096, 256
_SCORE_COPIES = 4


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
class MiningForecast:
    """What the teacher of a set embeds: numbers of texts, and seconds estimated from a sample."""

    dataset: str
    queries: int
    documents: int
    seconds: float


@dataclass(frozen=True, slots=True)
class BatchForecast:
    """The steps of a stage, from a sample of its batches; means, and the ``most`` of any step."""

    sampled: int
    texts: float  # different ones
    most_texts: int
    tokens: float
    most_tokens: int
    full: float  # share of the texts that reach the limit of tokens, and are cut or just fit
    duplicates: float  # share of the texts that are embedded once for several places
    negatives: float  # effective ones per query
    packs: float
    fill: float  # tokens of a pack as a share of ``pack_tokens``
    passes: float  # groups of queries that a step goes in
    recomputed: float  # share of the tokens that are embedded twice
    most_kept: int  # tokens whose graphs are held at once
    most_pack: int  # tokens of a pack
    most_scores: int  # queries times documents


@dataclass(frozen=True, slots=True)
class StageForecast:
    """A stage, or what is left of it; evaluations are those on the way and at its end."""

    config: StageConfig
    steps: int
    data: tuple[DataForecast, ...]
    mining: tuple[MiningForecast, ...]
    batches: BatchForecast
    evaluations: int
    seconds_per_step: float

    @property
    def mining_seconds(self) -> float:
        """Of all sets."""
        return sum(each.seconds for each in self.mining)

    @property
    def seconds(self) -> float:
        """Of all steps, without mining and evaluation."""
        return self.seconds_per_step * self.steps

    @property
    def tokens(self) -> float:
        """Of all steps."""
        return self.batches.tokens * self.steps


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """Bytes of one process; ``elements`` and ``trained`` are numbers of parameters."""

    weights: int
    elements: int
    trained: int
    gradients: int
    optimizer: int
    graph: ActivationBudget
    graphs: int  # held at once at most in the steps looked at
    pack: int  # work in progress of one pack
    loss: int  # of one piece
    measured: int  # taken since the model was loaded, steps included; there was no optimizer
    free: int  # on the device before the model was loaded

    @property
    def counted(self) -> int:
        """The sum of the parts."""
        held = self.weights + self.gradients + self.optimizer
        return held + self.graphs + self.pack + self.loss

    @property
    def peak(self) -> int:
        """What the run will need at most: as counted, or as measured if that was more."""
        return max(self.counted, self.measured + self.optimizer)


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a run would do; ``stages`` are those that are left."""

    config: TrainConfig  # with settled precision
    position: Position
    resumed: Path | None  # the checkpoint it goes on from
    finished: bool
    replaces: bool  # an earlier run in the folder would be deleted
    device: str
    tasks: tuple[str, ...] = ()
    stages: tuple[StageForecast, ...] = ()
    memory: TrainingMemory | None = None

    @property
    def seconds(self) -> float:
        """Of steps and mining."""
        return sum(stage.seconds + stage.mining_seconds for stage in self.stages)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the run would do, and its owner may not want; a line each."""
        found = [line for stage in self.stages for line in _stage_warnings(stage, self.memory)]
        if self.memory is not None and self.memory.peak > self.memory.free:
            needed, free = self.memory.peak / 1e9, self.memory.free / 1e9
            found.append(
                f"about {needed:.1f} GB are needed and {free:.1f} GB are free: lower memory_gb or "
                "pack_tokens, or train adapters"
            )
        return tuple(found)


def _stage_warnings(stage: StageForecast, memory: TrainingMemory | None) -> list[str]:
    name, batches = stage.config.name, stage.batches
    found = []
    idle = [row for row in stage.data if row.used and row.without]
    if idle and not stage.config.in_batch_negatives:
        sets = ", ".join(f"{row.name} ({row.without:.0%})" for row in idle)
        found.append(
            f"{name}: there are queries without negatives, which teach nothing without in-batch "
            f"negatives: {sets}"
        )
    if memory is not None and batches.recomputed:
        whole = math.ceil(batches.most_tokens * memory.graph.bytes_per_token / 1e8) / 10
        found.append(
            f"{name}: {batches.recomputed:.0%} of the tokens are embedded twice; with "
            f"memory_gb={whole:.1f} none would be"
        )
    return found


def forecast_memory(
    config: TrainConfig,
    model: NVEmbed,
    graph: ActivationBudget,
    stages: Sequence[StageForecast],
    *,
    measured: int,
    free: int,
) -> TrainingMemory:
    """Add up the largest step of the stages, for the model on its device."""
    parameters = list(trained_parameters(model).values())
    batches = [stage.batches for stage in stages]
    kept = max((each.most_kept for each in batches), default=0)
    scores = max((each.most_scores for each in batches), default=0)
    return TrainingMemory(
        weights=sum(weight_bytes(model).values()),
        elements=sum(parameter.numel() for parameter in model.parameters()),
        trained=sum(parameter.numel() for parameter in parameters),
        gradients=sum(parameter.nbytes for parameter in parameters),
        optimizer=optimizer_bytes(config.optimizer.kind, parameters),
        graph=graph,
        graphs=int(kept * graph.bytes_per_token),
        pack=_pack_bytes(config, model, max((each.most_pack for each in batches), default=0)),
        loss=_SCORE_COPIES * 4 * min(scores, PIECE_SCORES),
        measured=measured,
        free=free,
    )


def optimizer_bytes(kind: OptimizerKind, parameters: Iterable[nn.Parameter]) -> int:
    """What an optimizer keeps from step to step."""
    return sum(_state_bytes(kind, parameter) for parameter in parameters)


def _state_bytes(kind: OptimizerKind, parameter: nn.Parameter) -> int:
    if kind == "adamw_8bit" and parameter.numel() >= _EIGHT_BIT_FROM:
        scales = -(-parameter.numel() // _EIGHT_BIT_BLOCK) * 4
        return 2 * (parameter.numel() + scales)
    return 2 * (parameter.numel() * 4 if kind == "adamw_8bit" else parameter.nbytes)


def _pack_bytes(config: TrainConfig, model: NVEmbed, tokens: int) -> int:
    shape = Shape.of_config(
        model.backbone.model.config.get_text_config(),
        pooling_heads=int(getattr(model.pooling, "num_heads", 0)),
        pooling_latents=int(getattr(model.pooling, "num_latents", 0)),
    )
    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    on_cpu = model.device.type == "cpu"
    scored = min(model.backbone.max_tokens, short_tokens(dtype)) if on_cpu else 0
    return 2 * activation_bytes(shape, tokens, dtype.itemsize, score_tokens=scored)
