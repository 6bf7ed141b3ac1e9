"""Products of linear layers: those in float32 on a CPU are oneDNN's where that is faster than MKL.

Letters: T tokens, I and O widths of input and output.
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
