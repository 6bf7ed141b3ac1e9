"""Weights against the model that they are for: names, shapes, and that every value is a number.

Next file: ``interop/loading.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from nvembed.core.errors import ModelError
from nvembed.interop.shards import StoredTensor, read_tensor
from nvembed.interop.source import COPY_AGAIN

LM_HEAD = "lm_head"


@dataclass(frozen=True)
class Misfit:
    """How stored tensors differ from what a model needs.

    Attributes:
        missing: names that the model needs and nobody stored.
        unexpected: names that were stored and the model has no place for.
        shapes: name → stored and needed shape, of those that differ.
    """

    missing: Sequence[str]
    unexpected: Sequence[str]
    shapes: Mapping[str, tuple[Sequence[int], Sequence[int]]]

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
        """Refuse weights that do not fit.

        Raises:
            ModelError: naming them.
        """
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
    """Find the stored tensor of every one that is needed.

    Args:
        needed: shapes by name.
        stored: tensors of a checkpoint; a prefix that all names share is taken off where they fit
            without it.
        where: for the error.

    Returns:
        Name needed → name stored.

    Raises:
        ModelError: naming what is missing, unexpected or of another shape.
    """
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    for prefix in ("", *shared_prefixes(shapes)):
        stripped = {name.removeprefix(prefix): shape for name, shape in shapes.items()}
        if not misfit(needed, stripped).found:
            return {name: f"{prefix}{name}" for name in needed}
    misfit(needed, shapes).check(where)
    raise AssertionError("a misfit is an error")


def fill(module: nn.Module, stored: Mapping[str, StoredTensor], *, where: str) -> None:
    """Give a module that was built without memory its weights, in the dtype it was built in.

    Raises:
        ModelError: they do not fit, cannot be read, or are not finite.
    """
    empty = module.state_dict()
    names = fit({name: value.shape for name, value in empty.items()}, stored, where=where)
    tensors = {}
    for name, value in empty.items():
        tensor = read_tensor(names[name], stored[names[name]], torch.device("cpu"), value.dtype)
        check_finite_tensor(tensor, names[name], where=where)
        tensors[name] = tensor
    module.load_state_dict(tensors, assign=True)


_CHECKED_AT_ONCE = 1 << 22  # values


def check_finite(module: nn.Module, *, where: str) -> None:
    """Make sure that no weight is NaN or infinite.

    Raises:
        ModelError: one is; names the tensor.
    """
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
