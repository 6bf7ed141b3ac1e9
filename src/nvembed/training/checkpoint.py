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
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nvembed.core.errors import DataError, TrainingError, UserError
from nvembed.core.files import atomic_folder, tidy
from nvembed.core.ownership import remove_named, unnamed
from nvembed.core.text_files import read_json_object
from nvembed.interop.weights import check_finite_tensor
from nvembed.training.config import recipe_differences
from nvembed.training.distributed import DistributedContext, full, spread
from nvembed.training.optim import load_optimizer_state, optimizer_state

_NAME = re.compile(r"step-\d{10}(-end)?")


_FILES = re.compile(r"(weights|optimizer)\.safetensors|state\.json")


_WEIGHTS, _OPTIMIZER, _STATE = "weights.safetensors", "optimizer.safetensors", "state.json"


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
    processes: DistributedContext,
    keep: int,
) -> Path:
    """Write ``folder/step-…`` and drop all but the latest ``keep`` checkpoints.

    Raises:
        UserError: it could not be written (disk full), in every process; older checkpoints are
            untouched.
    """
    ended = "-end" if position.stage and not position.stage_step else ""
    target = folder / f"step-{position.step:010d}{ended}"
    weights = file_order(trained)
    tensors, numbers = optimizer_state(trained, optimizer)
    moments = file_order(tensors)
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


def save_weights(target: Path, trained: Parameters, processes: DistributedContext) -> None:
    """Write the folder ``target`` with the trained parameters alone, for ``restore_weights``."""
    weights = file_order(trained)

    def fill(temporary: Path, values: Iterator[Tensor]) -> None:
        write_tensors(temporary / _WEIGHTS, weights, values)

    _write_together(target, list(weights.values()), fill, processes)


def latest_checkpoint(folder: Path, *, log: Callable[[str], None] | None = None) -> Path | None:
    """The newest checkpoint that can be read, or ``None`` where there are none.

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
    """Put the state of the optimizer back, after it was built for the same stage."""
    numbers = _read_state(checkpoint)["optimizer"]
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
    load_optimizer_state(optimizer, trained, numbers, read_tensors(checkpoint / _OPTIMIZER))


def _write_together(
    target: Path,
    tensors: list[Tensor],
    fill: Callable[[Path, Iterator[Tensor]], None],
    processes: DistributedContext,
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


# By width, widest first: every tensor of a file then starts at a multiple of its width.
_NAMES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def file_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in the order of a file, the same in all processes."""
    return dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], values: Iterator[Tensor]) -> None:
    """Write a safetensors file and wait until it is on the disk.

    Args:
        path: the file.
        tensors: in the order of ``file_order``; only shapes and dtypes are looked at.
        values: gives their whole values in the same order; no more are taken than needed.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _ in tensors:
            value = next(values)
            out.write(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            del value  # before the next one is gathered
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
