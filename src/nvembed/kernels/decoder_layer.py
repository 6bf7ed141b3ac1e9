"""Decoder layers on a CPU without gradient: what is not a product, by ``native/decoder_layer.cpp``.

The sum that runs through the layers (the residual) is float32 whatever the weights are; products
take the type of the weights, and so does attention, reached by the one seam
(``model/attention.py``), where the CPU multiplies bfloat16. So a model in bfloat16 is both faster
and nearer to float32 than as transformers runs it.
With gradients, under autocast or ``torch.compile``, on other devices and without a compiler the
layers compute as they did.

Letters: T tokens of the pack, D width, H heads, E head width, F inner width of the MLP.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from nvembed.kernels.attention_bfloat16 import available as bfloat16_available
from nvembed.kernels.attention_float32 import available as attention_available
from nvembed.kernels.build import NativeError, load_named
from nvembed.kernels.elementwise import is_silu
from nvembed.model.attention import flat_attention

UNIT = 16
"""Widths must be a multiple of it, head widths of twice as many."""

# Families whose layer is norm, attention with rotary positions, norm, gated MLP, and nothing else.
FAMILIES = ("Llama", "Mistral", "Qwen2")


def native_layers(model: nn.Module) -> int:
    """Let the decoder layers of a model compute as above, in place; return how many will."""
    count = 0
    for module in model.modules():
        kind: Any = type(module)
        if kind.__name__ in [f"{family}DecoderLayer" for family in FAMILIES] and _fits(module):
            module.__class__ = _derived(kind)
            count += 1
    return count


def _fits(layer: Any) -> bool:
    widths = (layer.input_layernorm.weight.numel(), layer.mlp.gate_proj.weight.shape[0])
    return (
        all(width % UNIT == 0 for width in widths)
        and layer.self_attn.head_dim % (2 * UNIT) == 0
        and is_silu(layer.mlp)
    )


@cache
def _derived(kind: Any) -> Any:
    """The class that computes by this module: weights, names and copies stay as they are."""
    return type(
        f"Native{kind.__name__}", (kind,), {"forward": _forward, "torch_forward": kind.forward}
    )


def _forward(self: Any, hidden_states: Tensor, *arguments: Any, **options: Any) -> Tensor:
    positions = options.get("position_embeddings")
    segments = options.get("segments")
    if arguments or positions is None or segments is None or not _takes(self, hidden_states):
        return self.torch_forward(hidden_states, *arguments, **options)
    dtype = self.mlp.gate_proj.weight.dtype
    residual_TD = hidden_states[0].to(torch.float32, copy=True)
    attention = self.self_attn
    normed_TD = _add_norm(residual_TD, None, self.input_layernorm, dtype)
    # In bfloat16 where there is a kernel for it, else in float32: torch's own is slower.
    inner = dtype if bfloat16_available() else torch.float32
    query, key = (
        _rotate(project(normed_TD), positions, attention.head_dim, inner)
        for project in (attention.q_proj, attention.k_proj)
    )
    value = attention.v_proj(normed_TD).to(inner).unflatten(1, (-1, attention.head_dim))
    mixed_1THE, _ = flat_attention(
        attention,
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        options.get("attention_mask"),
        segments=segments,
        causal=options["causal"],
        scaling=attention.scaling,
    )
    attended_TD = attention.o_proj(mixed_1THE[0].flatten(1).to(dtype))
    normed_TD = _add_norm(residual_TD, attended_TD, self.post_attention_layernorm, dtype)
    gated_TF = _gate(self.mlp.gate_proj(normed_TD), self.mlp.up_proj(normed_TD))
    return _add(residual_TD, self.mlp.down_proj(gated_TF))[None]


def _takes(layer: Any, hidden_1TD: Tensor) -> bool:
    linears = (
        layer.self_attn.q_proj,
        layer.self_attn.k_proj,
        layer.self_attn.v_proj,
        layer.self_attn.o_proj,
        layer.mlp.gate_proj,
        layer.mlp.up_proj,
        layer.mlp.down_proj,
    )
    # Adapters and quantised weights are modules of other kinds.
    plain = all(
        isinstance(linear, nn.Linear)
        and type(linear.weight) is nn.Parameter
        and linear.weight.device.type == "cpu"
        for linear in linears
    )
    if not plain or layer.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    dtypes = {linear.weight.dtype for linear in linears}
    return (
        dtypes <= {torch.float32, torch.bfloat16}
        and len(dtypes) == 1
        and hidden_1TD.device.type == "cpu"
        and type(hidden_1TD) is Tensor
        and hidden_1TD.shape[0] == 1
        and not torch.is_autocast_enabled("cpu")
        and available()
    )


def available() -> bool:
    """Whether layers can compute so on this machine; compiles what they need."""
    return attention_available() and _library() is not None


@cache
def _library() -> ctypes.CDLL | None:
    try:
        return load_named("decoder_layer.cpp")
    except NativeError:
        return None


def _call(name: str, *arguments: Tensor | int | float | None) -> None:
    function = getattr(_library(), name)
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


def _add_norm(
    residual_TD: Tensor, added_TD: Tensor | None, norm: Any, dtype: torch.dtype
) -> Tensor:
    """Add to the residual in place, and return its norm in ``dtype``."""
    if added_TD is not None:
        added_TD = added_TD.contiguous()
    out_TD = torch.empty(residual_TD.shape, dtype=dtype)
    weight_D = norm.weight.float().contiguous()
    rows, width = residual_TD.shape
    wide = dtype is torch.float32
    eps = float(norm.variance_epsilon)
    _call("nvembed_add_norm", residual_TD, added_TD, weight_D, out_TD, wide, rows, width, eps)
    return out_TD


def _gate(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    gate_TF, up_TF = gate_TF.contiguous(), up_TF.contiguous()
    out_TF = torch.empty_like(gate_TF)
    wide = gate_TF.dtype is torch.float32
    _call("nvembed_gate", gate_TF, up_TF, out_TF, wide, out_TF.numel())
    return out_TF


def _add(residual_TD: Tensor, added_TD: Tensor) -> Tensor:
    """Add to the residual in place."""
    added_TD = added_TD.contiguous()
    rows, width = residual_TD.shape
    _call("nvembed_add", residual_TD, added_TD, added_TD.dtype is torch.float32, rows, width)
    return residual_TD


def _rotate(
    x_TI: Tensor, positions: tuple[Tensor, Tensor], width: int, dtype: torch.dtype
) -> Tensor:
    """Rotary positions on ``(T, H · E)``; returns ``(T, H, E)`` in ``dtype``.

    Args:
        x_TI: queries or keys.
        positions: cosines and sines, ``(1, T, E)``; the second half repeats the first.
        width: E.
        dtype: that of ``x_TI``, or float32.
    """
    x_TI = x_TI.contiguous()
    cos_TE, sin_TE = (angles[0].to(x_TI.dtype).contiguous() for angles in positions)
    tokens, heads = x_TI.shape[0], x_TI.shape[1] // width
    out_THE = torch.empty(tokens, heads, width, dtype=dtype)
    wide = x_TI.dtype is torch.float32
    wide_out = dtype is torch.float32
    shape = (tokens, heads, width, cos_TE.shape[1])
    _call("nvembed_rotate", x_TI, cos_TE, sin_TE, out_THE, wide, wide_out, *shape)
    return out_THE
