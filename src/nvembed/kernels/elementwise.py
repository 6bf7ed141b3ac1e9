"""RMS norms and gated activations in float32 on a CPU, by ``native/elementwise.cpp``.

torch takes a pass over memory for each operation; these take one forward and one backward, and keep
less for the way back. Needs no ``torch.compile``; under it, in other types and on other devices the
modules compute as they did.

Letters: any leading dimensions, then D numbers.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nvembed.kernels.build import elementwise_library

UNIT = 16
"""Widths must be a multiple of it."""

# Families whose norm is ``weight · x / rms(x)`` and whose MLP is ``down(silu(gate x) · up x)``.
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")


def native_elementwise(model: nn.Module) -> int:
    """Let the norms and gates of a model compute as above, in place; return how many will."""
    count = 0
    for module in model.modules():
        kind: Any = type(module)
        name = kind.__name__
        if name in [f"{family}RMSNorm" for family in FAMILIES]:
            module.__class__ = _derived(kind, _norm_forward)
        elif name in [f"{family}MLP" for family in FAMILIES] and is_silu(module):
            module.__class__ = _derived(kind, _mlp_forward)
        else:
            continue
        count += 1
    return count


def is_silu(module: Any) -> bool:
    """Whether the gate of an MLP is SiLU."""
    return type(module.act_fn).__name__ in ("SiLU", "SiLUActivation")


@cache
def _derived(kind: Any, forward: Any) -> Any:
    """The class that computes by ``forward``: weights, names and copies stay as they are."""
    return type(
        f"Native{kind.__name__}", (kind,), {"forward": forward, "torch_forward": kind.forward}
    )


def _norm_forward(self: Any, x: Tensor) -> Tensor:
    if not _takes(x, self.weight):
        return self.torch_forward(x)
    return _Norm.apply(x, self.weight, self.variance_epsilon)


def _mlp_forward(self: Any, x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return self.torch_forward(x)
    gate, up = self.gate_proj(x), self.up_proj(x)
    gated = _Gate.apply(gate, up) if _takes(gate, up) else self.act_fn(gate) * up
    return self.down_proj(gated)


def _takes(*tensors: Tensor) -> bool:
    return (
        all(
            type(x) in (Tensor, nn.Parameter)
            and x.dtype is torch.float32
            and x.device.type == "cpu"
            and x.shape[-1] % UNIT == 0
            for x in tensors
        )
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and elementwise_library() is not None
    )


def _call(name: str, tensors: tuple[Tensor, ...], *numbers: int | float) -> None:
    function = getattr(elementwise_library(), name)
    function.restype = None
    function(
        *(ctypes.c_void_p(x.data_ptr()) for x in tensors),
        *(ctypes.c_float(n) if isinstance(n, float) else ctypes.c_int64(n) for n in numbers),
        ctypes.c_int(torch.get_num_threads()),
    )


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x, weight_D = x.contiguous(), weight_D.contiguous()
        out = torch.empty_like(x)
        inverse = x.new_empty(x.shape[:-1])
        _call(
            "nvembed_norm_forward",
            (x, weight_D, out, inverse),
            inverse.numel(),
            x.shape[-1],
            float(eps),
        )
        ctx.save_for_backward(x, weight_D, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, inverse = ctx.saved_tensors
        d_out = gradients[0].contiguous()
        d_x = torch.empty_like(x)
        tensors = (x, weight_D, inverse, d_out, d_x)
        _call("nvembed_norm_backward", tensors, inverse.numel(), x.shape[-1])
        d_weight_D = None
        if ctx.needs_input_grad[1]:
            d_weight_D = (d_out * x * inverse[..., None]).flatten(0, -2).sum(0)
        return d_x, d_weight_D, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        _call("nvembed_gate_forward", (gate, up, out), out.numel())
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_out = gradients[0].contiguous()
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        _call("nvembed_gate_backward", (gate, up, d_out, d_gate, d_up), gate.numel())
        return d_gate, d_up
