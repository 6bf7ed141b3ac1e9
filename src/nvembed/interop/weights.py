"""Weights on disk and in a model: safetensors, their names and shapes, and that all are numbers.

The file is mapped afresh for each tensor: pages of a mapping count as memory of the process.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import align_module_device
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nvembed.core.errors import ModelError
from nvembed.core.files import write_json
from nvembed.interop.model_folder import (
    COPY_AGAIN,
    ModelSource,
    check_present,
    damaged,
    read_json_file,
)

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
    """Find every tensor of a model; headers are read, weights are not."""
    index_path = source.find(INDEX)
    if index_path is None:
        return read_header(source.require(SINGLE, hint="Official weights are safetensors"))
    index = read_json_file(index_path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        expected = '{"weight_map": {tensor: file}}'
        raise damaged("not an index of shards", index_path, expected)
    stored: dict[str, StoredTensor] = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        stored |= read_header(source.require(shard, hint=f"{INDEX} names it. {COPY_AGAIN}"))
    if absent := sorted(set(weight_map) - set(stored)):
        name, count = absent[0], len(absent)
        message = f"{name} is not in {weight_map[name]} ({count} such tensors)"
        raise damaged(message, index_path)
    return stored


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


def _broken(path: Path, error: Exception) -> ModelError:
    message = f"cannot be read ({' '.join(str(error).split())[:200]})"
    return damaged(message, path, "a complete safetensors file")


def write_shards(
    folder: Path,
    names: Iterable[str],
    sizes: Mapping[str, int],
    tensor: Callable[[str], Tensor],
    *,
    max_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write tensors as one file, or as shards with an index where one would be too large.

    ``sizes`` are bytes as written; ``tensor`` is asked shard by shard, so one shard is in memory.
    """
    split = split_state_dict_into_shards_factory(
        {name: sizes[name] for name in names},
        get_storage_size=int,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_bytes,
    )
    for filename, own in split.filename_to_tensors.items():
        weights = {name: tensor(name) for name in own}
        # transformers refuses files that do not say which library wrote them.
        save_file(weights, folder / filename, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / INDEX, index)


# --- In a model -----------------------------------------------------------------------------------


class Misfit(NamedTuple):
    """How stored tensors differ from what a model needs."""

    missing: Sequence[str]
    unexpected: Sequence[str]
    shapes: Mapping[str, tuple[Sequence[int], Sequence[int]]]  # stored and needed

    def check(self, where: str) -> None:
        """Refuse weights that do not fit; the first few tensors of each kind are named."""
        shapes = [
            f"{key} ({list(stored)} instead of {list(needed)})"
            for key, (stored, needed) in sorted(self.shapes.items())
        ]
        kinds = (
            ("missing", sorted(self.missing)),
            ("unexpected", sorted(self.unexpected)),
            ("of another shape", shapes),
        )
        if any(self):
            found = "; ".join(f"{_first(names, kind)}" for kind, names in kinds if names)
            raise ModelError(
                f"the weights do not fit: {found}",
                where=where,
                expected="the tensors that the configuration asks for, no more and no less",
                hint=f"{COPY_AGAIN}, or check that weights and configuration belong together",
            )


def _first(names: Sequence[str], kind: str) -> str:
    counted = "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"
    return f"{counted} {kind}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"


def fit(
    needed: Mapping[str, Sequence[int]], stored: Mapping[str, StoredTensor], *, where: str
) -> dict[str, str]:
    """Find the stored tensor of every one that is needed, without a prefix that all share."""

    def misfit(prefix: str) -> Misfit:
        shapes = {name.removeprefix(prefix): tensor.shape for name, tensor in stored.items()}
        return Misfit(
            [name for name in needed if name not in shapes],
            [name for name in shapes if name not in needed],
            {
                name: (shapes[name], shape)
                for name, shape in needed.items()
                if name in shapes and tuple(shapes[name]) != tuple(shape)
            },
        )

    for prefix in ("", *shared_prefixes(stored)):
        if not any(misfit(prefix)):
            return {name: f"{prefix}{name}" for name in needed}
    misfit("").check(where)
    raise AssertionError("a misfit is an error")


def fill(
    module: nn.Module,
    stored: Mapping[str, StoredTensor],
    *,
    where: str,
    stored_name: Callable[[str], str] = str,
    place: Callable[[str], torch.device] = lambda name: torch.device("cpu"),
    dtype: Callable[[Tensor], torch.dtype | None] = lambda value: value.dtype,
    read: Callable[[str, StoredTensor, torch.device, torch.dtype | None], Tensor] = read_tensor,
    filled: Callable[[str, nn.Module], nn.Module] = lambda name, part: part,
) -> None:
    """Give a module that was built without memory its weights, which are checked.

    ``stored_name`` gives the name on disk of a tensor of the module, ``place`` its device by its
    name, ``dtype`` its type by what the module has, where ``None`` keeps the stored one; ``read``
    gets a stored tensor where the file is not safetensors. ``filled`` gives what takes the place of
    a part, by its name, as soon as its own tensors are there.
    """
    empty = module.state_dict()
    shapes = {stored_name(name): tuple(value.shape) for name, value in empty.items()}
    names = fit(shapes, stored, where=where)
    for prefix in [name for name, _ in module.named_modules()]:  # of the parts none is kept here
        part, tensors = module.get_submodule(prefix), dict[str, Tensor]()
        own = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        for short, value in own:
            if (name := f"{prefix}.{short}" if prefix else short) in empty:
                key = names[stored_name(name)]
                tensors[short] = read(key, stored[key], place(name), dtype(value))
                check_finite_tensor(tensors[short], key, where=where)
        part.load_state_dict(tensors, strict=False, assign=True)
        if (made := filled(prefix, part)) is not part:
            module.set_submodule(prefix, made)


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
    if bad := int((~torch.isfinite(values)).sum()):
        raise ModelError(
            f"tensor {name} is not finite: {bad} of {values.numel()} values are NaN or infinite",
            where=where,
            expected="numbers",
            hint="The model was damaged in training or in a conversion; take another copy",
        )


def shared_prefixes(names: Collection[str]) -> list[str]:
    """Prefixes in front of all names but that of a language-model head, shortest first."""
    # Something must be left of every name.
    parts = [name.split(".")[:-1] for name in names if LM_HEAD not in name.split(".")]
    rows = takewhile(lambda row: len(set(row)) == 1, zip(*parts, strict=False))
    shared = [row[0] for row in rows]
    return [".".join(shared[:end]) + "." for end in range(1, len(shared) + 1)]
