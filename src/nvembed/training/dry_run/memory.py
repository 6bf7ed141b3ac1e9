"""How much memory training takes: counted weights, and a forecast of a step.

    weights         counted
    gradients       of the trained parameters, as large as they are
    optimizer       two more numbers for each of them; of adamw_8bit one byte per number
    graphs          tokens held between forward and backward times what was measured per token
    one pack        values and gradients at the fullest point of one layer; see ``model/memory.py``
    loss            scores of a piece: a few copies in float32

What the steps of the dry run took is measured besides: the allocator of a CPU keeps more than it
was asked for, and the larger number counts. Python and its libraries come on top. Checked against
the optimizers' own tensors in ``tests/unit/training/test_dry_run.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from nvembed.model.attention import short_tokens
from nvembed.model.embedder import NVEmbed
from nvembed.model.memory import Shape, activation_bytes, weight_bytes
from nvembed.training.config import OptimizerKind, TrainConfig
from nvembed.training.model import ActivationBudget
from nvembed.training.objective import PIECE_SCORES

# bitsandbytes: smaller tensors keep their moments in float32, larger ones a scale per block.
_EIGHT_BIT_FROM, _EIGHT_BIT_BLOCK = 4096, 256
_SCORE_COPIES = 4


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """Bytes of one process.

    Attributes:
        weights: of all modules.
        elements: numbers in them.
        trained: those that are tuned.
        gradients: of these.
        optimizer: its state.
        graph: what was measured, and the budget.
        graphs: held at once at most in the steps looked at.
        pack: work in progress of one pack.
        loss: of one piece.
        measured: what this process took since the model was loaded, steps included; it had no
            optimizer.
        free: on the device before the model was loaded.
    """

    weights: int
    elements: int
    trained: int
    gradients: int
    optimizer: int
    graph: ActivationBudget
    graphs: int
    pack: int
    loss: int
    measured: int
    free: int

    @property
    def counted(self) -> int:
        """The sum of the parts."""
        held = self.weights + self.gradients + self.optimizer
        return held + self.graphs + self.pack + self.loss

    @property
    def peak(self) -> int:
        """What the run will need at most: as counted, or as measured if that was more."""
        return max(self.counted, self.measured + self.optimizer)


def forecast_memory(
    config: TrainConfig,
    model: NVEmbed,
    trained: Iterable[nn.Parameter],
    graph: ActivationBudget,
    *,
    kept_tokens: int,
    pack_tokens: int,
    scores: int,
    measured: int,
    free: int,
) -> TrainingMemory:
    """Add up a step."""
    parameters = list(trained)
    return TrainingMemory(
        weights=sum(weight_bytes(model).values()),
        elements=sum(parameter.numel() for parameter in model.parameters()),
        trained=sum(parameter.numel() for parameter in parameters),
        gradients=sum(parameter.nbytes for parameter in parameters),
        optimizer=optimizer_bytes(config.optimizer.kind, parameters),
        graph=graph,
        graphs=int(kept_tokens * graph.bytes_per_token),
        pack=_pack_bytes(config, model, pack_tokens),
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
    name = "bfloat16" if config.precision == "bfloat16" else "float32"
    scored = 0
    if model.device.type == "cpu":
        scored = min(model.backbone.max_tokens, short_tokens(getattr(torch, name)))
    return 2 * activation_bytes(shape, tokens, getattr(torch, name).itemsize, score_tokens=scored)
