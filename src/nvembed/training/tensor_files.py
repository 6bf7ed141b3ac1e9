"""Tensors on disk: safetensors, written one tensor at a time, and whole from spread ones.

safetensors' own writer holds a second copy of all it writes. This one holds a single tensor, which
may be gathered from all processes for it, and gives a full disk as the ``OSError`` it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

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


def full(tensor: Tensor) -> Tensor:
    """The whole tensor, where it is spread over processes; all of them must ask at once."""
    from torch.distributed.tensor import DTensor

    detached = tensor.detach()
    return detached.full_tensor() if isinstance(detached, DTensor) else detached


def spread(value: Tensor, like: Tensor) -> Tensor:
    """``value`` on the device of ``like``, and this process's share of it where that is spread.

    Nothing is sent: every process has the whole value.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    # A copy in any case: values read from a file are its pages.
    moved = value.to(like.device, copy=True)
    if not isinstance(like, DTensor):
        return moved
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], values: Iterator[Tensor]) -> None:
    """Write a safetensors file and wait until it is on the disk.

    Args:
        path: the file.
        tensors: in the order of ``file_order``; only shapes and dtypes are looked at.
        values: gives their whole values in the same order; no more are taken than needed.

    Raises:
        OSError: the disk is full.
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
    """Names and values, one after the other; a value is a view of the file's pages.

    Raises:
        SafetensorError: the file is not complete.
        OSError: it cannot be read.
    """
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # not a mapping
            yield name, file.get_tensor(name)


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by name, from the header; a file that was cut off is noticed by its length.

    Raises:
        SafetensorError: the file is not complete.
        OSError: it cannot be read.
    """
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
