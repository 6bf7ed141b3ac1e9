"""The parts of a decoder that move more memory than they compute, fused by ``torch.compile``.

Norms and gated activations read and write whole tensors several times for a few operations; one
compiled loop reads and writes them once. Products and attention stay as they are: their libraries
do better than generated code, and attention over packs of ever other lengths would be compiled
again and again. Compiled once per process, for all lengths, which needs a C++ compiler on a CPU and
takes some seconds. What it gains is in docs/results.md.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


def compile_elementwise(backbone: nn.Module) -> int:
    """Compile the norms and gated activations of a backbone, in place; return how many."""
    count = 0
    for module in backbone.modules():
        kind = type(module)
        if kind.__name__.endswith(("RMSNorm", "MLP")):
            # The class alone decides how it computes: weights, names and copies stay as they are.
            module.__class__ = _compiled(kind.__name__, kind)  # type: ignore[arg-type]
            count += 1
    return count


@cache
def _compiled(name: str, kind: Any) -> Any:
    """The class that computes like ``kind`` in compiled code."""
    forward = _fused(kind.forward) if name.endswith("RMSNorm") else _gated_forward
    return type(f"Fused{name}", (kind,), {"forward": forward})


def _gated_forward(self: Any, x: Tensor) -> Tensor:
    """``down(act(gate x) · up x)``, the form of the gated MLPs of transformers."""
    out: Tensor = self.down_proj(_fused(_gate)(self.act_fn, self.gate_proj(x), self.up_proj(x)))
    return out


def _gate(activation: Any, gate: Tensor, up: Tensor) -> Tensor:
    out: Tensor = activation(gate) * up
    return out


@cache
def _fused(function: Any) -> Any:
    # On first use: importing the compiler takes seconds.
    return torch.compile(function, dynamic=True)
