"""Why a run had to stop: the errors that its steps end in."""

from __future__ import annotations

from nvembed.core.errors import TrainingError
from nvembed.core.runs import RunFolder
from nvembed.training.checkpoint import latest_checkpoint
from nvembed.training.config import StageConfig


def not_finite(
    run: RunFolder, value: float, what: str, stage: StageConfig, step: int
) -> TrainingError:
    """Say that a run stopped at a number that is no number, before the weights were changed."""
    last = latest_checkpoint(run.checkpoints)
    return TrainingError(
        f"the {what} of step {step} ({stage.name}) is {value}; the weights were not changed",
        where=str(run.path),
        expected="finite numbers",
        hint=f"Lower the learning rate or raise the temperature; last checkpoint: "
        f"{last.name if last else 'none'}",
    )


def interrupted(run: RunFolder, step: int) -> TrainingError:
    """Say that a run was stopped, and how it goes on."""
    return TrainingError(
        f"interrupted after step {step}; a checkpoint was written",
        where=str(run.checkpoints),
        hint="The same command goes on from there",
    )


def out_of_memory(stage: StageConfig, step: int, pack_tokens: int, longest: int) -> TrainingError:
    """Say that the device was too small for a step, whose longest text has so many tokens."""
    return TrainingError(
        f"the device ran out of memory in step {step} ({stage.name}): packs of "
        f"{pack_tokens:,} tokens, longest text {longest:,}",
        where="memory_gb, pack_tokens",
        hint="Lower pack_tokens, memory_gb or model.max_tokens, or set "
        "activation_checkpointing=true; the run goes on from its last checkpoint",
    )
