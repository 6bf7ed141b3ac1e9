"""Weights on disk: safetensors, in one file or in shards with an index.

Tensors are read one at a time. The file is mapped afresh for each, because pages of a mapping count
as memory of the process for as long as it lives, and here it lives for one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nvembed.core.errors import ModelError
from nvembed.core.files import write_json
from nvembed.interop.source import COPY_AGAIN, ModelSource, check_present, read_json_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor is stored and what its header says."""

    file: Path
    shape: tuple[int, ...]


def stored_tensors(source: ModelSource) -> dict[str, StoredTensor]:
    """Find every tensor of a model; headers are read, weights are not.

    Raises:
        ModelError: there are no safetensors, a shard is missing or broken, or the index names a
            tensor that its shard does not hold.
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
    """Read one tensor straight to its device and dtype.

    Args:
        name: of the tensor in the file.
        stored: where it is.
        place: device it goes to.
        dtype: ``None`` keeps the stored one.

    Raises:
        ModelError: the file cannot be read.
    """
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

    Returns:
        The files with weights.
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
    """Names and shapes of the tensors of one file.

    Raises:
        ModelError: it is not a complete safetensors file.
    """
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
