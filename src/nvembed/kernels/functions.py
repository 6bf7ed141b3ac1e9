"""Functions that compute in torch's place in a layer on a CPU, with their gradients.

Norms, gates and rotary positions are compiled code, one pass over memory each way: tensors are
float32 or bfloat16; what lies between is float32 and rounded once. Products in float32 are oneDNN's
where features of the CPU say that it is faster than MKL. The part of a low-rank adapter is added by
the product itself, where peft takes passes over tensors of the full width:

    h = s · x Aᵀ            y = x Wᵀ + h Bᵀ
    dh = s · dy B           dx = dy W + dh A        dA = dhᵀ x      dB = dyᵀ h

In float32 and with more tokens than the layer is wide, W + s · B A is made first. The parameters
stay peft's. Letters: T tokens, D width, H heads, E head width, F MLP, A angles of a token, I and O
widths of input and output, r rank.
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


# --- Products -------------------------------------------------------------------------------------


def product(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """``x Wᵀ + b``, differentiable in all three, for two-dimensional x."""
    if not _in_float32_on_cpu(x_TI, weight_OI) or not onednn_pays():
        return nn.functional.linear(x_TI, weight_OI, bias_O)
    if not torch.is_grad_enabled():
        return _onednn(x_TI, weight_OI, bias_O)
    out_TO: Tensor = _Product.apply(x_TI, weight_OI, bias_O)
    return out_TO


def same_in_every_process(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """``x Wᵀ`` without gradient, by oneDNN wherever torch has it: the same bits on every CPU."""
    if _in_float32_on_cpu(x_TI, weight_OI) and _has_onednn():
        return _onednn(x_TI, weight_OI)
    return x_TI @ weight_OI.T


def transposed_times(y_TO: Tensor, x_TI: Tensor) -> Tensor:
    """``yᵀ x`` without gradient: the gradient ``(O, I)`` of a weight."""
    if not _in_float32_on_cpu(y_TO, x_TI) or not onednn_pays():
        return y_TO.T @ x_TI
    # The first operand is the one that is rearranged: the smaller one.
    if y_TO.shape[1] <= x_TI.shape[1]:
        return _onednn(y_TO.T, x_TI.T)
    return _onednn(x_TI.T, y_TO.T).T


def linear(module: Any, x: Tensor) -> Tensor:
    """The forward of ``nn.Linear``, ``(…, I)`` → ``(…, O)``."""
    weight: Any = module.weight
    # Weights of other types are those of quantisation.
    if type(weight) is not nn.Parameter or not _in_float32_on_cpu(x, weight):
        out: Tensor = type(module).forward(module, x)
        return out
    return product(x.flatten(0, -2), weight, module.bias).view(*x.shape[:-1], module.out_features)


@cache
def onednn_pays() -> bool:
    """Whether float32 matrices are multiplied by oneDNN on this machine."""
    return _has_onednn() and this_cpu().onednn_multiplies_float32_faster


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _in_float32_on_cpu(*tensors: Tensor) -> bool:
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False  # of the latter: an exported graph has no oneDNN
    return all(
        tensor.dtype is torch.float32 and tensor.device.type == "cpu" and tensor.ndim > 1
        for tensor in tensors
    )


def _onednn(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    if not x_TI.shape[0] or not x_TI.shape[1]:
        return nn.functional.linear(x_TI, weight_OI, bias_O)
    # The operator that torch.compile puts in place of a linear layer.
    out_TO: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, weight_OI, bias_O, "none", [], "")
    return out_TO


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_TI, weight_OI)
        return _onednn(x_TI, weight_OI, bias_O)

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


# --- With an adapter ------------------------------------------------------------------------------


def is_plain_lora(module: Any) -> bool:
    """Whether an adapter is W + s · B A on a plain linear layer: no DoRA, nothing quantised."""
    return type(module.get_base_layer()) is nn.Linear and not module.lora_variant


def fused_lora(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``(…, I)`` → ``(…, O)``."""
    if module.disable_adapters or module.merged or len(module.active_adapters) != 1:
        out: Tensor = type(module).forward(module, x, *args, **kwargs)
        return out
    name = module.active_adapters[0]
    base = module.get_base_layer()
    dropout = module.lora_dropout[name]
    # Dropout that does nothing must not cost the sum of two gradients.
    dropped = dropout(x) if module.training and not isinstance(dropout, nn.Identity) else None
    output: Tensor = _Adapted.apply(
        *(x, dropped, base.weight, base.bias),
        *(module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]),
    )
    return output


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_rI: Tensor,
        b_Or: Tensor,
        scaling: float,
    ) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            x_TI = x.flatten(0, -2).to(dtype)
            seen_TI = x_TI if dropped is None else dropped.flatten(0, -2).to(dtype)
            hidden_Tr = product(seen_TI, a_rI.to(dtype)).mul_(scaling)
            bias = None if bias_O is None else bias_O.to(dtype)
            if dropped is None and _sum_pays(x_TI, weight_OI):
                y_TO = product(x_TI, _sum(weight_OI, a_rI, b_Or, scaling), bias)
            else:
                y_TO = product(x_TI, weight_OI.to(dtype), bias)
                y_TO.addmm_(hidden_Tr, b_Or.to(dtype).T)
        # The frozen weight is cast again on the way back: a cast copy per graph would cost more.
        ctx.save_for_backward(seen_TI, hidden_Tr, weight_OI, a_rI, b_Or)
        ctx.scaling, ctx.shape, ctx.input_dtype = scaling, x.shape, x.dtype
        ctx.dropped, ctx.has_input_gradient = dropped is not None, ctx.needs_input_grad[0]
        return y_TO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        seen_TI, hidden_Tr, weight_OI, a_rI, b_Or = ctx.saved_tensors
        dy_TO = gradients[0].flatten(0, -2).to(hidden_Tr.dtype)
        with torch.autocast(dy_TO.device.type, enabled=False):
            dtype = dy_TO.dtype
            db_Or = transposed_times(dy_TO, hidden_Tr).to(b_Or.dtype)
            dh_Tr = product(dy_TO, b_Or.to(dtype).T).mul_(ctx.scaling)
            da_rI = transposed_times(dh_Tr, seen_TI).to(a_rI.dtype)
            dx = dseen = None
            if ctx.has_input_gradient and not ctx.dropped and _sum_pays(dy_TO, weight_OI):
                sum_OI = _sum(weight_OI, a_rI, b_Or, ctx.scaling)
                dx = product(dy_TO, sum_OI.T).view(ctx.shape).to(ctx.input_dtype)
            elif ctx.has_input_gradient:
                dx_TI = product(dy_TO, weight_OI.to(dtype).T)
                if ctx.dropped:
                    dseen_TI = product(dh_Tr, a_rI.to(dtype).T)
                    dseen = dseen_TI.view(ctx.shape).to(ctx.input_dtype)
                else:
                    dx_TI.addmm_(dh_Tr, a_rI.to(dtype))
                dx = dx_TI.view(ctx.shape).to(ctx.input_dtype)
        return dx, dseen, None, None, da_rI, db_Or, None


def _sum_pays(rows: Tensor, weight_OI: Tensor) -> bool:
    return rows.dtype is torch.float32 and len(rows) >= max(weight_OI.shape)


def _sum(weight_OI: Tensor, a_rI: Tensor, b_Or: Tensor, scaling: float) -> Tensor:
    """The weight with its adapter, in float32; made again on the way back rather than kept."""
    return torch.addmm(weight_OI.float(), b_Or.float(), a_rI.float(), alpha=scaling)
