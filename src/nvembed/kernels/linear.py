"""Linear layers: products in float32 on a CPU, and layers with a low-rank adapter.

Where features of the CPU say that oneDNN is faster than MKL it multiplies float32. An adapter's
part is added by the product itself, where peft takes passes over tensors of the full width:

    h = s · x Aᵀ            y = x Wᵀ + h Bᵀ
    dh = s · dy B           dx = dy W + dh A        dA = dhᵀ x      dB = dyᵀ h

In float32 and with more tokens than the layer is wide, W + s · B A is made first. The parameters
stay peft's. Letters: T tokens, I and O widths of input and output, r rank.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from nvembed.kernels.build import this_cpu


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
