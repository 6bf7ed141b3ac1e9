"""Functions that compute in torch's place in a layer on a CPU, with their gradients.

Norms, gates, rotary positions and dropout are compiled code, one pass over memory each way: tensors
are float32 or bfloat16; what lies between is float32 and rounded once. Products in float32 are
oneDNN's where features of the CPU say that it is faster than MKL. Letters: T tokens, D width, H
heads, E head width, F MLP, A angles of a token, I and O widths of input and output.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nvembed.kernels.attention import plain_on_cpu
from nvembed.kernels.build import library, this_cpu

UNIT = 16
"""Widths must be a multiple of it, head widths of twice as many."""
SOURCE = "elementwise.cpp"
_LONGEST_ROW = 1024  # kLongestRow there


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


# --- Without graph: what those of ``trained.py`` are made of -------------------------------------


def normed(
    x: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``weight · x̂``, ``x̂ = x / rms(x)`` in ``dtype``, and ``1 / rms(x)`` in float32.

    ``dtype`` is that of x, or bfloat16.
    """
    x, weight_D = x.contiguous(), weight_D.contiguous()
    hat, out = torch.empty_like(x, dtype=dtype), torch.empty_like(x, dtype=dtype)
    inverse = x.new_empty(x.shape[:-1], dtype=torch.float32)
    types = (x.dtype is torch.float32, dtype is torch.float32)
    shape = (inverse.numel(), x.shape[-1])
    call(SOURCE, "norm_forward", x, weight_D, hat, out, inverse, *types, *shape, float(eps))
    return out, hat, inverse


def normed_again(hat: Tensor, weight_D: Tensor) -> Tensor:
    """``weight · x̂``, the bits that ``normed`` gave."""
    out, weight_D = torch.empty_like(hat), weight_D.contiguous()
    types = (weight_D.dtype is torch.float32, hat.dtype is torch.float32)
    shape = (hat.numel() // hat.shape[-1], hat.shape[-1])
    call(SOURCE, "norm_again", hat, weight_D, out, *types, *shape)
    return out


def norm_backward(
    d_out: Tensor, hat: Tensor, inverse: Tensor, weight_D: Tensor, trained: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x, and of the weight where it is trained."""
    d_out, weight_D = d_out.contiguous(), weight_D.contiguous()
    d_x = torch.empty_like(hat, dtype=weight_D.dtype)
    types = (weight_D.dtype is torch.float32, hat.dtype is torch.float32)
    shape = (inverse.numel(), hat.shape[-1])
    call(SOURCE, "norm_backward", hat, weight_D, inverse, d_out, d_x, *types, *shape)
    if not trained:
        return d_x, None
    d_weight_D = (d_out * hat.float()).flatten(0, -2).sum(0)
    return d_x, d_weight_D.to(weight_D.dtype)


def dropped(x_TI: Tensor, share: float, seed: int) -> Tensor:
    """0 in place of a share of numbers, the others over ``1 - share``; the same places by a seed.

    Not those of torch's generator, which takes six times as long. ``seed`` has up to 63 bits.
    """
    if not fits(x_TI):
        generator = torch.Generator(x_TI.device).manual_seed(seed)
        mask_TI = torch.empty_like(x_TI).bernoulli_(1 - share, generator=generator)
        return x_TI * mask_TI.div_(1 - share)
    x_TI = x_TI.contiguous()
    out_TI = torch.empty_like(x_TI)
    limit = int(share * 2**32)
    shape = (x_TI.dtype is torch.float32, x_TI.numel())
    call(SOURCE, "dropped", x_TI, out_TI, *shape, seed, limit, 1 / (1 - share))
    return out_TI


def takes_softmax(*tensors: Tensor, longest: int) -> bool:
    """Whether compiled code computes softmax of rows of up to so many numbers."""
    fits_type = plain_on_cpu(torch.bfloat16, *tensors) and longest <= _LONGEST_ROW
    return fits_type and library(SOURCE) is not None


def softmax_(score_RL: Tensor, scale: float) -> Tensor:
    """``softmax(scale · score)`` over the last dimension, in place; dense bfloat16."""
    length = score_RL.shape[-1]
    call(SOURCE, "softmax", score_RL, score_RL.numel() // length, length, scale)
    return score_RL


def softmax_backward_(weight_RL: Tensor, d_weight_RL: Tensor, scale: float) -> Tensor:
    """The gradient of scores in place of that of their ``softmax_``."""
    length = weight_RL.shape[-1]
    shape = (weight_RL.numel() // length, length)
    call(SOURCE, "softmax_backward", weight_RL, d_weight_RL, *shape, scale)
    return d_weight_RL


def gated(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """``silu(gate) · up`` of tensors of one shape."""
    gate_TF, up_TF = gate_TF.contiguous(), up_TF.contiguous()
    out_TF = torch.empty_like(gate_TF)
    shape = (gate_TF.dtype is torch.float32, out_TF.numel())
    call(SOURCE, "gate_forward", gate_TF, up_TF, out_TF, *shape)
    return out_TF


def gate_backward(d_out_TF: Tensor, gate_TF: Tensor, up_TF: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    d_gate, d_up = torch.empty_like(gate_TF), torch.empty_like(up_TF)
    shape = (gate_TF.dtype is torch.float32, gate_TF.numel())
    call(SOURCE, "gate_backward", gate_TF, up_TF, d_out_TF.contiguous(), d_gate, d_up, *shape)
    return d_gate, d_up


# --- Products -------------------------------------------------------------------------------------


def product(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """``x Wᵀ + b``, differentiable in all three, for two-dimensional x."""
    if not _in_float32_on_cpu(x_TI, weight_OI) or not onednn_pays():
        return nn.functional.linear(x_TI, weight_OI, bias_O)
    if not torch.is_grad_enabled():
        return onednn(x_TI, weight_OI, bias_O)
    return _Product.apply(x_TI, weight_OI, bias_O)


def same_in_every_process(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """``x Wᵀ`` without gradient, by oneDNN wherever torch has it: the same bits on every CPU."""
    if _in_float32_on_cpu(x_TI, weight_OI) and has_onednn():
        return onednn(x_TI, weight_OI)
    return x_TI @ weight_OI.T


def transposed_times(y_TO: Tensor, x_TI: Tensor) -> Tensor:
    """``yᵀ x`` without gradient: the gradient ``(O, I)`` of a weight."""
    if not _in_float32_on_cpu(y_TO, x_TI) or not onednn_pays():
        return y_TO.T @ x_TI
    # The first operand is the one that is rearranged: the smaller one.
    if y_TO.shape[1] <= x_TI.shape[1]:
        return onednn(y_TO.T, x_TI.T)
    return onednn(x_TI.T, y_TO.T).T


def linear(module: Any, x: Tensor) -> Tensor:
    """The forward of ``nn.Linear``, ``(…, I)`` → ``(…, O)``."""
    weight: Any = module.weight
    # Weights of other types are those of quantisation.
    if type(weight) is not nn.Parameter or not _in_float32_on_cpu(x, weight):
        return type(module).forward(module, x)
    return product(x.flatten(0, -2), weight, module.bias).view(*x.shape[:-1], module.out_features)


@cache
def onednn_pays() -> bool:
    """Whether float32 matrices are multiplied by oneDNN on this machine."""
    return has_onednn() and this_cpu().onednn_multiplies_float32_faster


def has_onednn() -> bool:
    """Whether this torch has oneDNN's products."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _in_float32_on_cpu(*tensors: Tensor) -> bool:
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False  # of the latter: an exported graph has no oneDNN
    return all(
        tensor.dtype is torch.float32 and tensor.device.type == "cpu" and tensor.ndim > 1
        for tensor in tensors
    )


def onednn(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """``x Wᵀ + b`` without gradient by oneDNN, of a plain or a packed weight."""
    if not x_TI.shape[0] or not x_TI.shape[1]:
        return nn.functional.linear(x_TI, weight_OI, bias_O)
    # The operator that torch.compile puts in place of a linear layer.
    return torch.ops.mkldnn._linear_pointwise(x_TI, weight_OI, bias_O, "none", [], "")


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_TI, weight_OI)
        return onednn(x_TI, weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TO,) = gradients
        x_TI, weight_OI = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            product(dy_TO, weight_OI.T) if needs_x else None,
            transposed_times(dy_TO, x_TI) if needs_weight else None,
            dy_TO.sum(0) if needs_bias else None,
        )
