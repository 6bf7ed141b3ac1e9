"""Weights on disk and in a model: safetensors, their names and shapes, and that all are numbers.

Tensors are read one at a time. The file is mapped afresh for each, because pages of a mapping count
as memory of the process for as long as it lives, and here it lives for one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import align_module_device
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nvembed.core.errors import ModelError
from nvembed.core.files import write_json
from nvembed.interop.model_folder import COPY_AGAIN, ModelSource, check_present, read_json_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
LM_HEAD = "lm_head"
_CHECKED_AT_ONCE = 1 << 22  # values

# --- On disk --------------------------------------------------------------------------------------


class StoredTensor(NamedTuple):
    """Where a tensor is stored and what its header says."""

    file: Path
    shape: tuple[int, ...]


def stored_tensors(source: ModelSource) -> dict[str, StoredTensor]:
    """Find every tensor of a model; headers are read, weights are not.

    A ModelError where a shard is missing or broken, or lacks a tensor that the index names.
    """
    index_path = source.find(INDEX)
    if index_path is None:
        return read_header(source.require(SINGLE, hint="Official weights are safetensors"))
    weight_map = _weight_map(index_path)
    stored: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        path = source.require(shard, hint=f"{INDEX} names it. {COPY_AGAIN}")
        stored |= read_header(path)
    absent = sorted(set(weight_map) - set(stored))
    if absent:
        raise ModelError(
            f"{absent[0]} is not in {weight_map[absent[0]]} ({len(absent)} such tensors)",
            where=str(index_path),
            hint=COPY_AGAIN,
        )
    return stored


def read_tensor(
    name: str, stored: StoredTensor, place: torch.device, dtype: torch.dtype | None
) -> Tensor:
    """Read one tensor straight to its device and dtype (``None`` keeps the stored one)."""
    try:
        with safe_open(stored.file, framework="pt") as file:
            # A copy in any case: the result must not depend on the file any more.
            tensor: Tensor = file.get_tensor(name).to(device=place, dtype=dtype, copy=True)
    except (SafetensorError, OSError) as error:
        raise _broken(stored.file, error) from error
    return tensor


def write_shards(
    folder: Path,
    names: Iterable[str],
    sizes: Mapping[str, int],
    tensor: Callable[[str], Tensor],
    *,
    max_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Write tensors as one file, or as shards with an index where one would be too large.

    Args:
        folder: where to.
        names: of the tensors, in the order they are laid out.
        sizes: bytes of each as it will be written.
        tensor: gives a tensor by name; asked shard by shard, so that only one shard is in memory.
        max_bytes: of a shard; a tensor that is larger gets its own.
    """
    shards: list[list[str]] = []
    room = 0
    for name in names:
        if not shards or sizes[name] > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= sizes[name]
    paths = []
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        filename = SINGLE
        if len(shards) > 1:
            filename = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weights = {name: tensor(name) for name in shard}
        # transformers refuses files that do not say which library wrote them.
        save_file(weights, folder / filename, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, filename)
        paths.append(folder / filename)
    if len(shards) > 1:
        total = sum(sizes[name] for name in weight_map)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return paths


def _weight_map(index_path: Path) -> dict[str, str]:
    index = read_json_file(index_path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(
            "not an index of shards",
            where=str(index_path),
            expected='{"weight_map": {tensor: file}}',
            hint=COPY_AGAIN,
        )
    return {str(name): str(shard) for name, shard in weight_map.items()}


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Names and shapes of the tensors of one file."""
    check_present(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {
                name: StoredTensor(path, tuple(file.get_slice(name).get_shape()))
                for name in file.keys()  # noqa: SIM118  # not a mapping
            }
    except (SafetensorError, OSError) as error:
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> ModelError:
    return ModelError(
        f"cannot be read ({' '.join(str(error).split())[:200]})",
        where=str(path),
        expected="a complete safetensors file",
        hint=COPY_AGAIN,
    )


# --- In a model -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Misfit:
    """How stored tensors differ from what a model needs."""

    missing: Sequence[str]
    unexpected: Sequence[str]
    shapes: Mapping[str, tuple[Sequence[int], Sequence[int]]]  # stored and needed

    @property
    def found(self) -> list[str]:
        """The first few tensors of each kind and their number, in words."""
        shapes = [
            f"{key} ({list(stored)} instead of {list(needed)})"
            for key, (stored, needed) in sorted(self.shapes.items())
        ]
        kinds = (
            ("missing", sorted(self.missing)),
            ("unexpected", sorted(self.unexpected)),
            ("of another shape", shapes),
        )
        return [f"{_counted(names)} {kind}: {_first(names)}" for kind, names in kinds if names]

    def check(self, where: str) -> None:
        """Refuse weights that do not fit."""
        if self.found:
            raise ModelError(
                f"the weights do not fit: {'; '.join(self.found)}",
                where=where,
                expected="the tensors that the configuration asks for, no more and no less",
                hint=f"{COPY_AGAIN}, or check that weights and configuration belong together",
            )


def misfit(needed: Mapping[str, Sequence[int]], stored: Mapping[str, Sequence[int]]) -> Misfit:
    """Compare shapes by name."""
    return Misfit(
        [name for name in needed if name not in stored],
        [name for name in stored if name not in needed],
        {
            name: (stored[name], shape)
            for name, shape in needed.items()
            if name in stored and tuple(stored[name]) != tuple(shape)
        },
    )


def fit(
    needed: Mapping[str, Sequence[int]], stored: Mapping[str, StoredTensor], *, where: str
) -> dict[str, str]:
    """Find the stored tensor of every one that is needed: name needed → name stored.

    A prefix that all stored names share is taken off where they fit without it. A ModelError names
    what is missing, unexpected or of another shape.
    """
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    for prefix in ("", *shared_prefixes(shapes)):
        stripped = {name.removeprefix(prefix): shape for name, shape in shapes.items()}
        if not misfit(needed, stripped).found:
            return {name: f"{prefix}{name}" for name in needed}
    misfit(needed, shapes).check(where)
    raise AssertionError("a misfit is an error")


def fill(module: nn.Module, stored: Mapping[str, StoredTensor], *, where: str) -> None:
    """Give a module that was built without memory its weights, in the dtype it was built in."""
    empty = module.state_dict()
    names = fit({name: value.shape for name, value in empty.items()}, stored, where=where)
    tensors = {}
    for name, value in empty.items():
        tensor = read_tensor(names[name], stored[names[name]], torch.device("cpu"), value.dtype)
        check_finite_tensor(tensor, names[name], where=where)
        tensors[name] = tensor
    module.load_state_dict(tensors, assign=True)


def check_finite(module: nn.Module, *, where: str) -> None:
    """Make sure that no weight is NaN or infinite; a ModelError names the tensor."""
    for prefix, part in module.named_modules():
        with align_module_device(part):  # weights that wait elsewhere come here meanwhile
            for name, tensor in part.named_parameters(recurse=False):
                check_finite_tensor(tensor, f"{prefix}.{name}" if prefix else name, where=where)


def check_finite_tensor(tensor: Tensor, name: str, *, where: str) -> None:
    """As ``check_finite``, of one tensor."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point()
    if not plain or tensor.device.type == "meta":  # quantised weights are of types of their own
        return
    values = tensor.detach()
    if values.dtype.itemsize == 1:
        values = values.float()
    # One pass without a mask, in parts, since a sum in float32 copies what is not. A sum that
    # overflows is looked at again, value by value.
    parts = values.reshape(-1).split(_CHECKED_AT_ONCE)
    if all(bool(torch.isfinite(part.sum(dtype=torch.float32))) for part in parts):
        return
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise ModelError(
            f"tensor {name} is not finite: {bad} of {values.numel()} values are NaN or infinite",
            where=where,
            expected="numbers",
            hint="The model was damaged in training or in a conversion; take another copy",
        )


def shared_prefixes(names: Collection[str]) -> list[str]:
    """Prefixes in front of all names but that of a language-model head, shortest first."""
    parts = [name.split(".") for name in names if LM_HEAD not in name.split(".")]
    if not parts:
        return []
    shortest = min(map(len, parts)) - 1  # something must be left of every name
    length = 0
    while length < shortest and all(part[length] == parts[0][length] for part in parts):
        length += 1
    return [".".join(parts[0][:end]) + "." for end in range(1, length + 1)]


def _counted(names: Sequence[str]) -> str:
    return f"{len(names)} tensor is" if len(names) == 1 else f"{len(names)} tensors are"


def _first(names: Sequence[str], shown: int = 3) -> str:
    return ", ".join(names[:shown]) + (", …" if len(names) > shown else "")
