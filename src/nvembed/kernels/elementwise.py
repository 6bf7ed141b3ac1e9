"""Norms, gates and rotary positions by compiled code: one pass over memory each way.

Tensors are float32 or bfloat16; what lies between is float32 and rounded once. Letters: T tokens,
D width, H heads, E head width, F MLP, A angles of a token.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nvembed.kernels.attention import plain_on_cpu
from nvembed.kernels.build import library

UNIT = 16
"""Widths must be a multiple of it, head widths of twice as many."""
SOURCE = "elementwise.cpp"


def fits(*tensors: Tensor) -> bool:
    """Whether compiled code computes with these: of one type, and float32 outside of autocast."""
    dtype = tensors[0].dtype
    plain = dtype is torch.float32 and not torch.is_autocast_enabled("cpu")
    return (
        (plain or dtype is torch.bfloat16)
        and plain_on_cpu(dtype, *tensors)
        and all(x.shape[-1] % UNIT == 0 for x in tensors)
        and library(SOURCE) is not None
    )


def call(source: str, name: str, *arguments: Tensor | int | float | None) -> None:
    """Call ``nvembed_NAME`` of a library; a bool says that numbers are float32."""
    function = getattr(library(source), f"nvembed_{name}")
    function.restype = None

    def converted(argument: Tensor | int | float | None) -> Any:
        if isinstance(argument, Tensor):
            return ctypes.c_void_p(argument.data_ptr())
        if isinstance(argument, bool):
            return ctypes.c_int(argument)
        if isinstance(argument, float):
            return ctypes.c_float(argument)
        return ctypes.c_void_p(None) if argument is None else ctypes.c_int64(argument)

    function(*map(converted, arguments), ctypes.c_int(torch.get_num_threads()))


def gate(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """``silu(gate) · up``, differentiable where a gradient is asked for."""
    if torch.is_grad_enabled():
        out_TF: Tensor = Gate.apply(gate_TF, up_TF)
        return out_TF
    return _gate(gate_TF.contiguous(), up_TF.contiguous())


def rotate(
    x_TI: Tensor, cos_TA: Tensor, sin_TA: Tensor, width: int, dtype: torch.dtype, way: float = 1.0
) -> Tensor:
    """Turn ``(T, H · E)`` by the angles of its tokens; returns ``(T, H, E)`` in ``dtype``.

    ``way`` -1 turns back, which is the gradient of turning. Angles are rounded to the type of x.
    """
    x_TI = x_TI.contiguous()
    cos_TA, sin_TA = (angles.to(x_TI.dtype).contiguous() for angles in (cos_TA, sin_TA))
    tokens, heads = x_TI.shape[0], x_TI.shape[1] // width
    out_THE = torch.empty(tokens, heads, width, dtype=dtype)
    wide, wide_out = x_TI.dtype is torch.float32, dtype is torch.float32
    shape = (tokens, heads, width, cos_TA.shape[1])
    call(SOURCE, "rotate", x_TI, cos_TA, sin_TA, out_THE, wide, wide_out, *shape, way)
    return out_THE


class Norm(torch.autograd.Function):
    """``weight · x / rms(x)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """``x`` of any shape ``(…, D)``."""
        x, weight_D = x.contiguous(), weight_D.contiguous()
        out = torch.empty_like(x)
        inverse = x.new_empty(x.shape[:-1], dtype=torch.float32)
        shape = (x.dtype is torch.float32, inverse.numel(), x.shape[-1])
        call(SOURCE, "norm_forward", x, weight_D, out, inverse, *shape, float(eps))
        ctx.save_for_backward(x, weight_D, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Of the input, and of the weight where it is trained."""
        x, weight_D, inverse = ctx.saved_tensors
        d_out = gradients[0].contiguous()
        d_x = torch.empty_like(x)
        shape = (x.dtype is torch.float32, inverse.numel(), x.shape[-1])
        call(SOURCE, "norm_backward", x, weight_D, inverse, d_out, d_x, *shape)
        d_weight_D = None
        if ctx.needs_input_grad[1]:
            normed = x.float() * inverse[..., None]
            d_weight_D = (d_out * normed).flatten(0, -2).sum(0).to(weight_D.dtype)
        return d_x, d_weight_D, None


class Gate(torch.autograd.Function):
    """``silu(gate) · up``."""

    @staticmethod
    def forward(ctx: Any, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        """Both of one shape."""
        gate_TF, up_TF = gate_TF.contiguous(), up_TF.contiguous()
        ctx.save_for_backward(gate_TF, up_TF)
        return _gate(gate_TF, up_TF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Of gate and up."""
        gate_TF, up_TF = ctx.saved_tensors
        d_out = gradients[0].contiguous()
        d_gate, d_up = torch.empty_like(gate_TF), torch.empty_like(up_TF)
        shape = (gate_TF.dtype is torch.float32, gate_TF.numel())
        call(SOURCE, "gate_backward", gate_TF, up_TF, d_out, d_gate, d_up, *shape)
        return d_gate, d_up


class Rotated(torch.autograd.Function):
    """``rotate`` in the type of its input, with a gradient for it."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, cos_TA: Tensor, sin_TA: Tensor, width: int) -> Tensor:
        """See ``rotate``."""
        ctx.save_for_backward(cos_TA, sin_TA)
        ctx.width = width
        return rotate(x_TI, cos_TA, sin_TA, width, x_TI.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Of the input."""
        cos_TA, sin_TA = ctx.saved_tensors
        d_out_TI = gradients[0].flatten(1)
        back_THE = rotate(d_out_TI, cos_TA, sin_TA, ctx.width, d_out_TI.dtype, way=-1.0)
        return back_THE.flatten(1), None, None, None


def _gate(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    out_TF = torch.empty_like(gate_TF)
    shape = (gate_TF.dtype is torch.float32, out_TF.numel())
    call(SOURCE, "gate_forward", gate_TF, up_TF, out_TF, *shape)
    return out_TF
