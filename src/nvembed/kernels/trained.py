"""Linear layers in training: adapters in few passes over memory, and a graph that keeps little.

An adapter's part is added by the product itself, where peft takes passes over the full width:

    h = s · x Aᵀ            y = x Wᵀ + h Bᵀ
    dh = s · dy B           dx = dy W + dh A        dA = dhᵀ x      dB = dyᵀ h      dW = dyᵀ x

In float32 and with more tokens than the layer is wide, W + s · B A is made first. Layers of one
input keep it once, in the type that they compute in; one that a norm or a gate makes is not kept
but made again on the way back, from what the gradient of that needs anyway, and a dropout from its
seed. Parameters stay peft's. Letters: T tokens, I and O widths of input and output, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nvembed.kernels import functions
from nvembed.kernels.functions import linear, onednn_pays, product, transposed_times

Gradients = tuple[Tensor | None, ...]


def is_plain_lora(module: Any) -> bool:
    """Whether an adapter is W + s · B A on a plain linear layer: no DoRA, nothing quantised."""
    return type(module.get_base_layer()) is nn.Linear and not module.lora_variant


def fused_lora(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``(…, I)`` → ``(…, O)``."""
    layer = None if args or kwargs else _adapted(module)
    if layer is None:
        return type(module).forward(module, x, *args, **kwargs)
    return _apply(_Given(), [x], [layer])[0]


def linears(x: Tensor, modules: Sequence[Any], norm: Any = None) -> list[Tensor]:
    """What several linear layers give for one input ``(…, I)``, or for its RMS norm."""
    found = (_layer(module, x) for module in modules)
    layers = [layer for layer in found if layer is not None]
    whole = len(layers) == len(modules) and not torch.compiler.is_compiling()
    if whole and norm is not None and _norm_fits(x, norm):
        return _apply(_Normed(float(norm.variance_epsilon)), [x, norm.weight], layers)
    x = x if norm is None else norm(x)
    return _apply(_Given(), [x], layers) if whole else [module(x) for module in modules]


def gated_linear(gate: Tensor, up: Tensor, module: Any) -> Tensor:
    """What a linear layer gives for ``silu(gate) · up``, which compiled code computes."""
    layer = _layer(module, gate)
    if layer is None:
        return module(trained_gate(gate, up))
    return _apply(_Gated(), [gate, up], [layer])[0]


# --- What the input is made from ------------------------------------------------------------------


# Each makes an input ``(T, I)`` of a type and tells what is kept; makes it again from that; and
# gives the gradients of what it was made from.


class _Given:
    def make(self, dtype: torch.dtype, x_TI: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        x_TI = x_TI.to(dtype)
        return x_TI, (x_TI,)

    def again(self, x_TI: Tensor) -> Tensor:
        return x_TI

    def back(self, needs: Sequence[bool], d_TI: Tensor, x_TI: Tensor) -> Gradients:
        return (d_TI,)


@dataclass(frozen=True, slots=True)
class _Normed:
    eps: float

    def make(
        self, dtype: torch.dtype, x_TI: Tensor, weight_I: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        out_TI, hat_TI, inverse_T = functions.normed(x_TI, weight_I, self.eps, dtype)
        return out_TI, (hat_TI, inverse_T, weight_I)

    def again(self, hat_TI: Tensor, inverse_T: Tensor, weight_I: Tensor) -> Tensor:
        return functions.normed_again(hat_TI, weight_I)

    def back(
        self,
        needs: Sequence[bool],
        d_TI: Tensor,
        hat_TI: Tensor,
        inverse_T: Tensor,
        weight_I: Tensor,
    ) -> Gradients:
        return functions.norm_backward(d_TI, hat_TI, inverse_T, weight_I, needs[1])


class _Gated:
    def make(
        self, dtype: torch.dtype, gate_TI: Tensor, up_TI: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        kept = gate_TI.contiguous(), up_TI.contiguous()
        return functions.gated(*kept), kept

    def again(self, gate_TI: Tensor, up_TI: Tensor) -> Tensor:
        return functions.gated(gate_TI, up_TI)

    def back(
        self, needs: Sequence[bool], d_TI: Tensor, gate_TI: Tensor, up_TI: Tensor
    ) -> Gradients:
        return functions.gate_backward(d_TI, gate_TI, up_TI)


_Origin = _Given | _Normed | _Gated


class _Made(torch.autograd.Function):
    """The input by itself."""

    @staticmethod
    def forward(ctx: Any, origin: _Origin, *given: Tensor) -> Tensor:
        out, kept = origin.make(given[0].dtype, *given)
        ctx.save_for_backward(*kept)
        ctx.origin = origin
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Gradients:
        needs = ctx.needs_input_grad[1:]
        return None, *ctx.origin.back(needs, gradients[0], *ctx.saved_tensors)


def trained_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """``weight · x / rms(x)`` by compiled code, with gradients; x of any shape ``(…, D)``."""
    return _Made.apply(_Normed(eps), x, weight_D)


def trained_gate(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) · up`` by compiled code, with gradients."""
    return _Made.apply(_Gated(), gate, up)


def _norm_fits(x: Tensor, norm: Any) -> bool:
    """Whether compiled code computes a norm: in float32 under autocast too, rounded at its end."""
    half = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16
    with torch.autocast("cpu", enabled=False):
        return (half or not torch.is_autocast_enabled("cpu")) and functions.fits(x, norm.weight)


def is_watched(module: nn.Module) -> bool:
    """Whether somebody's hooks want the module itself to be called."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in hooks)


# --- Layers ---------------------------------------------------------------------------------------


class _Layer(NamedTuple):
    """The parameters of a linear layer; ``a`` and ``b`` of its adapter."""

    weight_OI: Tensor
    bias_O: Tensor | None
    a_rI: Tensor | None = None
    b_Or: Tensor | None = None
    scaling: float = 1.0
    dropout: float = 0.0
    seed: int = 0


def _layer(module: Any, x: Tensor) -> _Layer | None:
    """The layer of a module that computes by the kernels and that nobody watches."""
    forward = vars(module).get("forward")
    if not isinstance(forward, partial) or is_watched(module):
        return None
    if forward.func is fused_lora:
        return _adapted(module)
    weight: Any = getattr(module, "weight", None)
    fits = torch.is_autocast_enabled(x.device.type) or getattr(weight, "dtype", None) is x.dtype
    plain = forward.func is linear and type(weight) is nn.Parameter and x.device.type == "cpu"
    if not plain or not fits:
        return None
    return _Layer(weight, module.bias)


def _adapted(module: Any) -> _Layer | None:
    if module.disable_adapters or module.merged or len(module.active_adapters) != 1:
        return None
    name = module.active_adapters[0]
    base, dropout = module.get_base_layer(), module.lora_dropout[name]
    share = dropout.p if module.training and not isinstance(dropout, nn.Identity) else 0.0
    return _Layer(
        *(base.weight, base.bias, module.lora_A[name].weight, module.lora_B[name].weight),
        module.scaling[name],
        share,
        int(torch.randint(2**62, ())) if share else 0,
    )


def _seen(x_TI: Tensor, layer: _Layer) -> Tensor:
    """What an adapter sees of an input."""
    return functions.dropped(x_TI, layer.dropout, layer.seed) if layer.dropout else x_TI


def _apply(origin: _Origin, given: Sequence[Tensor], layers: Sequence[_Layer]) -> list[Tensor]:
    leading = given[0].shape[:-1]
    device = given[0].device.type
    half = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if half else given[0].dtype
    rows = (x.flatten(0, -2) if x.ndim > 2 else x for x in given)
    parameters = (parameter for layer in layers for parameter in layer[:4])
    settings = [layer[4:] for layer in layers]
    outputs = _Linears.apply(origin, dtype, len(given), settings, *rows, *parameters)
    return [out_TO.view(*leading, -1) for out_TO in outputs]


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        origin: _Origin,
        dtype: torch.dtype,
        count: int,
        settings: Sequence[tuple[Any, ...]],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        given, parameters = tensors[:count], tensors[count:]
        with torch.autocast(given[0].device.type, enabled=False):
            x_TI, kept = origin.make(dtype, *given)
            found = [_forward(x_TI, layer) for layer in _layers(parameters, settings)]
        ctx.save_for_backward(*kept, *(hidden_Tr for _, hidden_Tr in found), *parameters)
        ctx.origin, ctx.count, ctx.settings, ctx.num_kept = origin, count, settings, len(kept)
        return tuple(y_TO for y_TO, _ in found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Gradients:
        saved = ctx.saved_tensors  # which may be asked for once where layers are recomputed
        kept, rest, num_layers = saved[: ctx.num_kept], saved[ctx.num_kept :], len(ctx.settings)
        needs = ctx.needs_input_grad[4:]
        needed = _by_layer(needs[ctx.count :])
        layers = _layers(rest[num_layers:], ctx.settings)
        with torch.autocast(gradients[0].device.type, enabled=False):
            dx_TI: Tensor | None = None
            x_TI = ctx.origin.again(*kept)
            found: list[Tensor | None] = []
            for dy_TO, hidden_Tr, layer, wanted in zip(
                gradients, rest[:num_layers], layers, needed, strict=True
            ):
                dh_Tr, own = _parameter_gradients(dy_TO, x_TI, hidden_Tr, layer, wanted)
                found += own
                if any(needs[: ctx.count]):
                    dx_TI = _add_input_gradient(dx_TI, dy_TO, dh_Tr, layer)
            if dx_TI is None:
                back: Gradients = (None,) * ctx.count
            else:
                back = ctx.origin.back(needs[: ctx.count], dx_TI, *kept)
        return None, None, None, None, *back, *found


def _layers(parameters: Sequence[Any], settings: Sequence[tuple[Any, ...]]) -> list[_Layer]:
    return [_Layer(*own, *how) for own, how in zip(_by_layer(parameters), settings, strict=True)]


def _by_layer(values: Sequence[Any]) -> list[Sequence[Any]]:
    return [values[first : first + 4] for first in range(0, len(values), 4)]


def _forward(x_TI: Tensor, layer: _Layer) -> tuple[Tensor, Tensor | None]:
    """Return y and h."""
    dtype = x_TI.dtype
    bias_O = None if layer.bias_O is None else layer.bias_O.to(dtype)
    if layer.a_rI is None or layer.b_Or is None:
        return product(x_TI, layer.weight_OI.to(dtype), bias_O), None
    hidden_Tr = product(_seen(x_TI, layer), layer.a_rI.to(dtype)).mul_(layer.scaling)
    if _sum_pays(x_TI, layer):
        return product(x_TI, _sum(layer), bias_O), hidden_Tr
    y_TO = product(x_TI, layer.weight_OI.to(dtype), bias_O)
    return y_TO.addmm_(hidden_Tr, layer.b_Or.to(dtype).T), hidden_Tr


# Gradients may be in the computing type: autograd gives them that of their parameter.
def _parameter_gradients(
    dy_TO: Tensor, x_TI: Tensor, hidden_Tr: Tensor | None, layer: _Layer, needs: Sequence[bool]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return dh, and the gradients of weight, bias, A and B."""
    d_weight_OI = transposed_times(dy_TO, x_TI) if needs[0] else None
    d_bias_O = dy_TO.sum(0) if needs[1] else None
    if hidden_Tr is None or layer.b_Or is None:
        return None, [d_weight_OI, d_bias_O, None, None]
    dh_Tr = product(dy_TO, layer.b_Or.to(dy_TO.dtype).T).mul_(layer.scaling)
    d_a_rI = transposed_times(dh_Tr, _seen(x_TI, layer))
    return dh_Tr, [d_weight_OI, d_bias_O, d_a_rI, transposed_times(dy_TO, hidden_Tr)]


def _add_input_gradient(
    total_TI: Tensor | None, dy_TO: Tensor, dh_Tr: Tensor | None, layer: _Layer
) -> Tensor:
    dtype = dy_TO.dtype
    summed = _sum_pays(dy_TO, layer)
    weight_OI = _sum(layer) if summed else layer.weight_OI.to(dtype)
    if total_TI is None:
        total_TI = product(dy_TO, weight_OI.T)
    elif dtype is torch.float32 and onednn_pays():
        total_TI += product(dy_TO, weight_OI.T)
    else:
        total_TI.addmm_(dy_TO, weight_OI)
    if dh_Tr is None or layer.a_rI is None or summed:
        return total_TI
    a_rI = layer.a_rI.to(dtype)
    if not layer.dropout:
        return total_TI.addmm_(dh_Tr, a_rI)
    return total_TI.add_(_seen(product(dh_Tr, a_rI.T), layer))  # the gradient of a dropout


def _sum_pays(rows: Tensor, layer: _Layer) -> bool:
    enough = rows.dtype is torch.float32 and len(rows) >= max(layer.weight_OI.shape)
    return enough and layer.a_rI is not None and not layer.dropout


def _sum(layer: _Layer) -> Tensor:
    """The weight with its adapter, in float32; made again on the way back rather than kept."""
    assert layer.a_rI is not None
    assert layer.b_Or is not None
    a_rI, b_Or = layer.a_rI.float(), layer.b_Or.float()
    return torch.addmm(layer.weight_OI.float(), b_Or, a_rI, alpha=layer.scaling)
