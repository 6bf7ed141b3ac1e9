"""Checkpoints: everything a run needs to go on as if it had never stopped, and nothing else.

    checkpoints/step-0000000400/       after an update; ``step-…-end`` is the end of a stage
      weights.safetensors     trained parameters (adapters and head, or all); never a frozen base
      optimizer.safetensors   the optimizer's tensors, by parameter name
      state.json              where the run stands, the optimizer's numbers, recipe, processes

No generator state: every random choice derives from (seed, stage, step, pack). A checkpoint is
written under another name, brought to the disk and moved into place, so one that is there is
complete; where the disk lost one nevertheless, the one before it is taken. No pickle.

With several processes all of them call these functions; parameters that are spread over them are
gathered one at a time, and one process writes.
"""

from __future__ import annotations

import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from nvembed.core.errors import DataError, TrainingError, UserError
from nvembed.core.files import atomic_folder, tidy
from nvembed.core.ownership import remove_named, unnamed
from nvembed.core.text_files import read_json_object
from nvembed.interop.weights import check_finite_tensor
from nvembed.training.processes import Processes
from nvembed.training.recipe_differences import recipe_differences
from nvembed.training.tensor_files import (
    file_order,
    full,
    read_tensors,
    spread,
    sync_folder,
    tensor_shapes,
    write_tensors,
)

_NAME = re.compile(r"step-\d{10}(-end)?")
_FILES = re.compile(r"(weights|optimizer)\.safetensors|state\.json")
_WEIGHTS, _OPTIMIZER, _STATE = "weights.safetensors", "optimizer.safetensors", "state.json"

# Of a parameter group: how this machine computes, which is not part of the run's state.
_MACHINE = {"params", "fused", "foreach", "capturable"}

Parameters = Mapping[str, nn.Parameter]


@dataclass(frozen=True)
class Position:
    """Where a run stands.

    Attributes:
        step: optimizer updates done in the whole run.
        stage: index of the current stage, from 0.
        stage_step: updates done in it.
        seconds: training time so far.
        extra: state of other parts of the run, such as early stopping; JSON.
    """

    step: int = 0
    stage: int = 0
    stage_step: int = 0
    seconds: float = 0.0
    extra: Mapping[str, Any] = field(default_factory=dict)


def trained_parameters(model: nn.Module, **others: nn.Parameter) -> dict[str, nn.Parameter]:
    """Parameters that receive gradients, by name: those of the model, and ``others``.

    To be asked again after the model was prepared for several processes, which may replace them.
    """
    return {name: p for name, p in model.named_parameters() if p.requires_grad} | others


def save_checkpoint(
    folder: Path,
    position: Position,
    trained: Parameters,
    optimizer: torch.optim.Optimizer,
    *,
    recipe: Mapping[str, Any],
    processes: Processes,
    keep: int,
) -> Path:
    """Write ``folder/step-…`` and drop all but the latest ``keep`` checkpoints.

    Args:
        folder: of all checkpoints.
        position: where the run stands.
        trained: by name, see ``trained_parameters``.
        optimizer: of the current stage.
        recipe: the configuration as plain data, see ``check_recipe``.
        processes: those that train together; the first one writes, the others give their shares.
        keep: checkpoints to keep.

    Raises:
        UserError: it could not be written (disk full), in every process; older checkpoints are
            untouched.
    """
    ended = "-end" if position.stage and not position.stage_step else ""
    target = folder / f"step-{position.step:010d}{ended}"
    weights = file_order(trained)
    moments, numbers = _optimizer_state(trained, optimizer)
    state = {
        "position": asdict(position),
        "optimizer": numbers,
        "recipe": recipe,
        "processes": processes.count,
    }

    def fill(temporary: Path, values: Iterator[Tensor]) -> None:
        write_tensors(temporary / _WEIGHTS, weights, values)
        write_tensors(temporary / _OPTIMIZER, moments, values)
        _write_state(temporary / _STATE, state)

    _write_together(target, [*weights.values(), *moments.values()], fill, processes)
    if processes.is_main:
        remove_leftovers(folder)
        found = _checkpoints(folder)
        # What lies behind this one is of a future that did not come: a broken checkpoint, whose
        # steps are being repeated.
        number = found.index(target) + 1
        for old in (*found[: max(0, number - keep)], *found[number:]):
            remove_named(old, _FILES)
    return target


def save_weights(target: Path, trained: Parameters, processes: Processes) -> None:
    """Write the folder ``target`` with the trained parameters alone, for ``restore_weights``.

    Raises:
        UserError: it could not be written, in every process; the folder is as it was.
    """
    weights = file_order(trained)

    def fill(temporary: Path, values: Iterator[Tensor]) -> None:
        write_tensors(temporary / _WEIGHTS, weights, values)

    _write_together(target, list(weights.values()), fill, processes)


def latest_checkpoint(folder: Path, *, log: Callable[[str], None] | None = None) -> Path | None:
    """The newest checkpoint that can be read, or ``None`` where there are none.

    Args:
        folder: of all checkpoints.
        log: told one line for every newer one that cannot be read.

    Raises:
        TrainingError: there are checkpoints and none can be read.
    """
    found = _checkpoints(folder)
    problem = ""
    for path in reversed(found):
        try:
            tensor_shapes(path / _WEIGHTS)
            tensor_shapes(path / _OPTIMIZER)
            _read_state(path)
        except (OSError, DataError, SafetensorError) as error:
            problem = " ".join(str(error).split())[:200]
            if log is not None:
                log(f"checkpoint {path.name} cannot be read ({problem}): taking the one before it")
        else:
            return path
    if found:
        raise TrainingError(
            f"none of the {len(found)} checkpoints can be read ({problem})",
            where=str(folder),
            hint="Copy the folder back if it was copied, or start over with --fresh",
        )
    return None


def remove_leftovers(folder: Path) -> None:
    """Clear up after killed writes; only where nothing is being written."""
    for names in ("step-*", "best"):
        tidy(folder, names)


def read_position(checkpoint: Path) -> Position:
    """Where the run stood when the checkpoint was written."""
    return Position(**_read_state(checkpoint)["position"])


def check_recipe(checkpoint: Path, recipe: Mapping[str, Any], processes: int = 1) -> str | None:
    """Make sure that a run may go on from a checkpoint.

    Returns:
        A line to log where the number of processes is another, which is allowed.

    Raises:
        TrainingError: the checkpoint is of another recipe; names the keys.
    """
    state = _read_state(checkpoint)
    if different := recipe_differences(state["recipe"], recipe):
        raise TrainingError(
            f"the checkpoint is of another recipe: {'; '.join(different)}",
            where=str(checkpoint),
            hint="Train with the old values, choose another output folder, or use --fresh",
        )
    if state["processes"] == processes:
        return None
    return (
        f"the checkpoint was written by {state['processes']} processes and {processes} go on: the "
        "batches are the same, but sums are taken in another order and differ in their last bits"
    )


def restore_weights(checkpoint: Path, trained: Parameters) -> None:
    """Put the trained parameters back.

    Raises:
        TrainingError: the checkpoint belongs to another model.
        ModelError: a weight is NaN or infinite.
    """
    file = checkpoint / _WEIGHTS
    try:
        shapes = tensor_shapes(file)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"cannot be read ({' '.join(str(error).split())[:200]})",
            where=str(file),
            hint="Copy the folder back if it was copied, or start over with --fresh",
        ) from error
    different = sorted(set(shapes) ^ set(trained)) or sorted(
        name for name, shape in shapes.items() if shape != tuple(trained[name].shape)
    )
    if different:
        raise TrainingError(
            f"the checkpoint does not fit the model ({len(different)} parameters differ, first "
            f"{different[0]})",
            where=str(checkpoint),
            hint="Train with the configuration the run was started with, or with --fresh",
        )
    with torch.no_grad():
        for name, value in read_tensors(file):
            check_finite_tensor(value, name, where=str(file))
            trained[name].copy_(spread(value, trained[name]))


def restore_optimizer(
    checkpoint: Path, trained: Parameters, optimizer: torch.optim.Optimizer
) -> None:
    """Put the state of the optimizer back, after it was built for the same stage.

    Raises:
        TrainingError: it is the state of other parameters, or of another optimizer.
    """
    numbers = _read_state(checkpoint)["optimizer"]
    _check_optimizer(checkpoint, numbers, trained, optimizer)
    machine = {
        id(parameter): group for group in optimizer.param_groups for parameter in group["params"]
    }
    state: dict[Tensor, dict[str, Any]] = {
        trained[name]: dict(values) for name, values in numbers["parameters"].items()
    }
    for entry, value in read_tensors(checkpoint / _OPTIMIZER):
        name, _, key = entry.rpartition("|")
        parameter = trained[name]
        group = machine[id(parameter)]
        if value.shape == parameter.shape:
            # Moments of a run whose weights were not held in float32 yet are of 16 bits.
            is_narrow = value.dtype in (torch.bfloat16, torch.float16)
            wide = value.float() if is_narrow and parameter.dtype == torch.float32 else value
            restored = spread(wide, parameter)
        elif key == "step" and not (group.get("fused") or group.get("capturable")):
            restored = value.clone()  # torch's loops count on the CPU, its kernels on the device
        else:
            restored = value.to(parameter.device, copy=True)
        state.setdefault(parameter, {})[key] = restored
    optimizer.state.clear()
    optimizer.state.update(state)
    # By rate and decay: sharded parameters have groups of their own, and a run may go on without
    # sharding.
    groups = {(group["peak"], group["weight_decay"]): group for group in numbers["groups"]}
    for group in optimizer.param_groups:
        saved = groups[group["peak"], group["weight_decay"]]
        for key, value in saved.items():
            group[key] = tuple(value) if isinstance(group.get(key), tuple) else value


def _check_optimizer(
    checkpoint: Path,
    numbers: Mapping[str, Any],
    trained: Parameters,
    optimizer: torch.optim.Optimizer,
) -> None:
    names = {*numbers["parameters"]}
    names.update(entry.rpartition("|")[0] for entry in tensor_shapes(checkpoint / _OPTIMIZER))
    saved = {(group["peak"], group["weight_decay"]) for group in numbers["groups"]}
    wanted = {(group["peak"], group["weight_decay"]) for group in optimizer.param_groups}
    if not names <= {*trained} or not wanted <= saved:
        raise TrainingError(
            "the state of the optimizer does not fit the parameters of this run",
            where=str(checkpoint),
            hint="Copy the folder back if it was copied, or start over with --fresh",
        )


def _optimizer_state(
    trained: Parameters, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by ``parameter|key`` in file order, and everything else as plain data."""
    tensors: dict[str, Tensor] = {}
    parameters: dict[str, dict[str, Any]] = {}
    for name, parameter in trained.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}|{key}"] = value
            else:
                parameters.setdefault(name, {})[key] = value
    groups = [
        {key: value for key, value in group.items() if key not in _MACHINE}
        for group in optimizer.param_groups
    ]
    return file_order(tensors), {"parameters": parameters, "groups": groups}


def _write_together(
    target: Path,
    tensors: list[Tensor],
    fill: Callable[[Path, Iterator[Tensor]], None],
    processes: Processes,
) -> None:
    """Let one process fill the folder ``target`` while all give their shares of the tensors."""
    values = (full(tensor) for tensor in tensors)
    error: UserError | None = None
    if processes.is_main:
        try:
            for other in unnamed(target, _FILES)[:1]:
                raise UserError("is no part of a checkpoint", where=str(other), hint="Move it away")
            with atomic_folder(target) as temporary:
                fill(temporary, values)
                sync_folder(temporary)
            sync_folder(target.parent)
        except UserError as caught:
            error = caught
    # The rest: of a process that does not write, all of them; of one that could not, those that
    # the others are still going to gather.
    deque(values, maxlen=0)
    if processes.agree(error is not None):
        raise error or UserError("the process that writes could not", where=str(target))


def _checkpoints(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def _write_state(path: Path, state: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as out:
        json.dump(state, out)
        out.flush()
        os.fsync(out.fileno())


def _read_state(checkpoint: Path) -> dict[str, Any]:
    """Read where the run stood, and all that is no tensor.

    Raises:
        DataError: it is not what ``save_checkpoint`` writes.
    """
    file = checkpoint / _STATE
    state = read_json_object(file, "the state of a checkpoint")
    try:
        position = Position(**state["position"])
        counts = (position.step, position.stage, position.stage_step, state["processes"])
        is_sound = (
            all(isinstance(count, int) and count >= 0 for count in counts)
            and isinstance(position.seconds, int | float)
            and all(part is None or isinstance(part, dict) for part in position.extra.values())
            and position.stage <= len(state["recipe"]["stages"])
            and all(isinstance(v, dict) for v in state["optimizer"]["parameters"].values())
            and all({"peak", "weight_decay"} <= {*g} for g in state["optimizer"]["groups"])
        )
    except (KeyError, TypeError, AttributeError):
        is_sound = False
    if not is_sound:
        raise DataError("not the state of a checkpoint", where=str(file))
    return state
