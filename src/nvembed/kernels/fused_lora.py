"""A linear layer with a low-rank adapter, forward and backward as few passes over memory.

peft's layer computes ``W x``, then ``B (A x)`` as a second tensor of the full width, scales it, and
adds the two; the backward pass takes as many passes again. Here the scale goes onto the narrow
tensor, and the adapter's part is added by the product itself:

    h = s · x Aᵀ            y = x Wᵀ + h Bᵀ
    dh = s · dy B           dx = dy W + dh A        dA = dhᵀ x      dB = dyᵀ h

In float32 and with more tokens than the layer is wide, the sum W + s · B A is made first, which
costs less than the passes over y and dx; 16 bit would round the adapter away. With dropout, x in
``h`` and in ``dA`` is the dropped-out one and ``dh A`` is its gradient. The parameters stay peft's,
so that adapters are saved, loaded and merged by it. What it gains is in docs/results.md.

Letters: T tokens, I and O widths of input and output, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nvembed.kernels.matmul import product, times_transposed, transposed_times


def has_plain_base(module: Any) -> bool:
    """Whether an adapter's layer is a plain linear one: quantised layers are of other classes."""
    return type(module.get_base_layer()) is nn.Linear


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
    output: Tensor = _Product.apply(
        x,
        dropped,
        base.weight,
        base.bias,
        module.lora_A[name].weight,
        module.lora_B[name].weight,
        module.scaling[name],
    )
    return output


class _Product(torch.autograd.Function):
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
            hidden_Tr = times_transposed(seen_TI, a_rI.to(dtype)).mul_(scaling)
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
            dh_Tr = times_transposed(dy_TO, b_Or.to(dtype).T).mul_(ctx.scaling)
            da_rI = transposed_times(dh_Tr, seen_TI).to(a_rI.dtype)
            dx = dseen = None
            if ctx.has_input_gradient and not ctx.dropped and _sum_pays(dy_TO, weight_OI):
                sum_OI = _sum(weight_OI, a_rI, b_Or, ctx.scaling)
                dx = times_transposed(dy_TO, sum_OI.T).view(ctx.shape).to(ctx.input_dtype)
            elif ctx.has_input_gradient:
                dx_TI = times_transposed(dy_TO, weight_OI.to(dtype).T)
                if ctx.dropped:
                    dseen = (
                        times_transposed(dh_Tr, a_rI.to(dtype).T)
                        .view(ctx.shape)
                        .to(ctx.input_dtype)
                    )
                else:
                    dx_TI.addmm_(dh_Tr, a_rI.to(dtype))
                dx = dx_TI.view(ctx.shape).to(ctx.input_dtype)
        return dx, dseen, None, None, da_rI, db_Or, None


def _sum_pays(rows: Tensor, weight_OI: Tensor) -> bool:
    return rows.dtype is torch.float32 and len(rows) >= max(weight_OI.shape)


def _sum(weight_OI: Tensor, a_rI: Tensor, b_Or: Tensor, scaling: float) -> Tensor:
    """The weight with its adapter, in float32; made again on the way back rather than kept."""
    return torch.addmm(weight_OI.float(), b_Or.float(), a_rI.float(), alpha=scaling)
