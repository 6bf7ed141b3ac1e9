"""Checkpoints: everything a run needs to go on as if it had never stopped, and nothing else.

    checkpoints/step-0000000400/
      weights.safetensors     trained parameters (adapters and head, or all); never a frozen base
      optimizer.safetensors   moments, by parameter name
      rng.safetensors         generator states of torch
      state.json              step, stage, and the other generator states

A checkpoint is written under another name and moved into place, so one that is there is complete.
No pickle.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from nvembed.core.errors import TrainingError
from nvembed.core.files import atomic_folder
from nvembed.core.seeding import capture_rng, restore_rng

_NAME = re.compile(r"step-(\d{10})")


@dataclass(frozen=True)
class Position:
    """Where a run stands.

    Attributes:
        step: optimizer updates done in the whole run.
        stage: index of the current stage, from 0.
        stage_step: updates done in it.
        seconds: training time so far.
    """

    step: int = 0
    stage: int = 0
    stage_step: int = 0
    seconds: float = 0.0


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Named parameters that receive gradients."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def save_checkpoint(
    folder: Path,
    position: Position,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    keep: int,
) -> Path:
    """Write ``folder/step-…`` and drop all but the latest ``keep`` checkpoints.

    Raises:
        UserError: it could not be written (disk full); older checkpoints are untouched.
    """
    target = folder / f"step-{position.step:010d}"
    names = {id(parameter): name for name, parameter in trained_parameters(model)}
    moments = {
        f"{names[id(parameter)]}|{key}": value.detach().contiguous()
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }
    weights = {name: p.detach().contiguous() for name, p in trained_parameters(model)}
    rng = capture_rng()
    generators = {"torch": rng.pop("torch")}
    generators |= {f"cuda.{index}": state for index, state in enumerate(rng.pop("cuda"))}
    with atomic_folder(target) as temporary:
        (temporary / "weights.safetensors").write_bytes(save(weights))
        (temporary / "optimizer.safetensors").write_bytes(save(moments))
        (temporary / "rng.safetensors").write_bytes(save(generators))
        (temporary / "state.json").write_text(json.dumps({**vars(position), "rng": rng}))
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint, or ``None``."""
    found = _checkpoints(folder)
    return found[-1] if found else None


def read_position(checkpoint: Path) -> Position:
    """Where the run stood when the checkpoint was written."""
    state = _read_state(checkpoint)
    return Position(state["step"], state["stage"], state["stage_step"], state["seconds"])


def restore_weights(checkpoint: Path, model: nn.Module) -> None:
    """Put the trained parameters back.

    Raises:
        TrainingError: the checkpoint belongs to another model.
    """
    weights = load_file(checkpoint / "weights.safetensors")
    parameters = dict(trained_parameters(model))
    different = sorted(set(weights) ^ set(parameters)) or sorted(
        name for name, value in weights.items() if value.shape != parameters[name].shape
    )
    if different:
        raise TrainingError(
            f"the checkpoint does not fit the model ({len(different)} parameters differ, first "
            f"{different[0]})",
            where=str(checkpoint),
            hint="Train with the configuration the run was started with, or with --fresh",
        )
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)


def restore_optimizer(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put the moments and the random generators back, after the optimizer was built."""
    parameters = dict(trained_parameters(model))
    state: dict[Tensor, dict[str, Tensor]] = {}
    for entry, value in load_file(checkpoint / "optimizer.safetensors").items():
        name, _, key = entry.rpartition("|")
        parameter = parameters[name]
        # AdamW keeps its step counters on the CPU.
        state.setdefault(parameter, {})[key] = (
            value if key == "step" else value.to(parameter.device)
        )
    optimizer.state.clear()
    optimizer.state.update(state)
    generators = load_file(checkpoint / "rng.safetensors")
    rng: dict[str, Any] = _read_state(checkpoint)["rng"]
    cuda = [generators[f"cuda.{index}"] for index in range(len(generators) - 1)]
    restore_rng({**rng, "torch": generators["torch"], "cuda": cuda})


def _checkpoints(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def _read_state(checkpoint: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise TrainingError(
            f"the checkpoint cannot be read ({error})",
            where=str(checkpoint),
            hint="Delete this folder to go on from the one before it",
        ) from error
    return state
