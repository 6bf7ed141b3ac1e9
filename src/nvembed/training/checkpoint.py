"""Checkpoints: everything a run needs to go on as if it had never stopped, and nothing else.

A folder ``step-0000000400``, or ``step-…-end`` at the end of a stage, holds the trained parameters,
the optimizer's tensors and ``state.json``; no generator state, which derives from seed and step.
With several processes all call these functions; tensors are gathered one at a time, one writes.
"""

from __future__ import annotations

import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from io import BufferedWriter
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nvembed.core.errors import DataError, TrainingError, UserError
from nvembed.core.files import atomic_folder, read_json_object, tidy
from nvembed.core.ownership import remove_named, unnamed
from nvembed.interop.weights import check_finite_tensor
from nvembed.training.config import TrainConfig, recipe_differences
from nvembed.training.distributed import DistributedContext, full, spread

_NAME = re.compile(r"step-\d{10}(-end)?")
_FILES = re.compile(r"(weights|optimizer)\.safetensors|state\.json")
WEIGHTS, _OPTIMIZER, _STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
# Of a parameter group: how this machine computes, which is not part of the run's state.
_MACHINE = {"params", "fused", "foreach", "capturable"}
_COPY_BACK = "Copy the folder back if it was copied, or start over with --fresh"

Parameters = Mapping[str, nn.Parameter]


@dataclass(frozen=True)
class Position:
    """Where a run stands."""

    step: int = 0  # optimizer updates done in the whole run
    stage: int = 0  # index of the current stage, from 0
    stage_step: int = 0  # updates done in it
    seconds: float = 0.0  # training time so far
    extra: Mapping[str, Any] = field(default_factory=dict)  # of other parts of the run; JSON


def trained_parameters(model: nn.Module, **others: nn.Parameter | None) -> dict[str, nn.Parameter]:
    """Parameters with gradients, by name, and ``others``; sharding replaces them."""
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return own | {name: p for name, p in others.items() if p is not None}


def save_checkpoint(
    folder: Path,
    position: Position,
    trained: Parameters,
    optimizer: torch.optim.Optimizer,
    *,
    recipe: Mapping[str, Any],
    processes: DistributedContext,
    keep: int,
) -> Path:
    """Write ``folder/step-…`` and drop all but the latest ``keep``; if one fails, all do."""
    ended = "-end" if position.stage and not position.stage_step else ""
    target = folder / f"step-{position.step:010d}{ended}"
    tensors, numbers = _optimizer_state(trained, optimizer)
    state = {
        "position": asdict(position),
        "optimizer": numbers,
        "recipe": recipe,
        "processes": processes.count,
    }
    _write_together(target, {WEIGHTS: trained, _OPTIMIZER: tensors}, processes, state)
    if processes.is_main:
        remove_leftovers(folder)
        found = _checkpoints(folder)
        # Later ones are broken: their steps are being repeated.
        number = found.index(target) + 1
        for old in (*found[: max(0, number - keep)], *found[number:]):
            remove_named(old, _FILES)
    return target


def save_weights(target: Path, trained: Parameters, processes: DistributedContext) -> None:
    """Write the folder ``target`` with the trained parameters alone, for ``restore_weights``."""
    _write_together(target, {WEIGHTS: trained}, processes)


def latest_checkpoint(folder: Path, *, log: Callable[[str], None] | None = None) -> Path | None:
    """The newest checkpoint that can be read; ``None`` where there is none at all."""
    found = _checkpoints(folder)
    problem = ""
    for path in reversed(found):
        try:
            tensor_shapes(path / WEIGHTS)
            tensor_shapes(path / _OPTIMIZER)
            _read_state(path)
        except (OSError, DataError, SafetensorError) as error:
            problem = " ".join(str(error).split())[:200]
            if log is not None:
                log(f"checkpoint {path.name} cannot be read ({problem}): taking the one before it")
        else:
            return path
    if not found:
        return None
    raise TrainingError(
        f"none of the {len(found)} checkpoints can be read ({problem})",
        where=str(folder),
        hint=_COPY_BACK,
    )


def remove_leftovers(folder: Path) -> None:
    """Clear up after killed writes; only where nothing is being written."""
    for names in ("step-*", "best"):
        tidy(folder, names)


def read_position(checkpoint: Path) -> Position:
    """Where the run stood when the checkpoint was written."""
    return Position(**_read_state(checkpoint)["position"])


def check_recipe(checkpoint: Path, recipe: Mapping[str, Any], processes: int = 1) -> str | None:
    """Refuse a checkpoint of another recipe; return what to say of another number of processes."""
    state = _read_state(checkpoint)
    before = state["recipe"]
    with suppress(ValidationError):  # options that are newer than the checkpoint have defaults
        before = TrainConfig.model_validate_json(json.dumps(before)).model_dump(mode="json")
    if different := recipe_differences(before, recipe):
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
    """Put the trained parameters back, which must be those of this model, and finite."""
    file = checkpoint / WEIGHTS
    try:
        shapes = tensor_shapes(file)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"cannot be read ({' '.join(str(error).split())[:200]})",
            where=str(file),
            hint=_COPY_BACK,
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
    """Put the state of an optimizer back, after it was built for the same stage."""
    numbers = _read_state(checkpoint)["optimizer"]
    names = {*numbers["parameters"]}
    names.update(entry.rpartition("|")[0] for entry in tensor_shapes(checkpoint / _OPTIMIZER))
    # By rate and decay: sharded parameters have groups of their own, and a run may go on without
    # sharding.
    saved = {(group["peak"], group["weight_decay"]): group for group in numbers["groups"]}
    wanted = [(group["peak"], group["weight_decay"]) for group in optimizer.param_groups]
    if not names <= {*trained} or not {*wanted} <= {*saved}:
        raise TrainingError(
            "the state of the optimizer does not fit the parameters of this run",
            where=str(checkpoint),
            hint=_COPY_BACK,
        )
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    state: dict[Tensor, dict[str, Any]] = {
        trained[name]: dict(values) for name, values in numbers["parameters"].items()
    }
    for entry, value in read_tensors(checkpoint / _OPTIMIZER):
        name, _, key = entry.rpartition("|")
        parameter = trained[name]
        group = group_of[id(parameter)]
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
    for group, kind in zip(optimizer.param_groups, wanted, strict=True):
        for key, value in saved[kind].items():
            group[key] = tuple(value) if isinstance(group.get(key), tuple) else value


def _optimizer_state(
    trained: Parameters, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of the state by ``parameter|key``, and everything else as plain data."""
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
    return tensors, {"parameters": parameters, "groups": groups}


def _write_together(
    target: Path,
    files: Mapping[str, Mapping[str, Tensor]],
    processes: DistributedContext,
    state: dict[str, Any] | None = None,
) -> None:
    """Let one process fill the folder ``target`` while all give their shares of the tensors."""
    ordered = {name: file_order(tensors) for name, tensors in files.items()}
    values = (full(tensor) for tensors in ordered.values() for tensor in tensors.values())
    error: UserError | None = None
    if processes.is_main:
        try:
            for other in unnamed(target, _FILES)[:1]:
                raise UserError("is no part of a checkpoint", where=str(other), hint="Move it away")
            with atomic_folder(target) as temporary:
                for name, tensors in ordered.items():
                    write_tensors(temporary / name, tensors, values)
                if state is not None:
                    with _synced(temporary / _STATE) as out:
                        out.write(json.dumps(state).encode())
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


def _read_state(checkpoint: Path) -> dict[str, Any]:
    """Read where the run stood, and all that is no tensor."""
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


def file_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in the order of a file: the widest types first, so that all are aligned."""
    return dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], values: Iterator[Tensor]) -> None:
    """Write and sync a safetensors file; ``values`` gives one tensor at a time, in order."""
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        dtype = str(tensor.dtype).removeprefix("torch.").replace("uint", "u")  # uint8 is U8
        header[name] = {
            "dtype": dtype.replace("int", "i").replace("float", "f").upper(),
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with _synced(path) as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _ in tensors:
            value = next(values)
            out.write(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            del value  # before the next one is gathered


@contextmanager
def _synced(path: Path) -> Iterator[BufferedWriter]:
    """A file to write, which is on the disk when the block ends."""
    with open(path, "wb") as out:
        yield out
        out.flush()
        os.fsync(out.fileno())


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and values, one after the other; a value is a view of the file's pages."""
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # not a mapping
            yield name, file.get_tensor(name)


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by name, from the header; a file that was cut off is noticed by its length."""
    with safe_open(path, framework="pt") as file:
        return {
            name: tuple(file.get_slice(name).get_shape())
            for name in file.keys()  # noqa: SIM118
        }


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the file system can do that."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
