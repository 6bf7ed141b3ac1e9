"""Norms, gated MLPs and decoder layers on a CPU by compiled code, and the one hook of all kernels.

Norms and gates take one pass each way in float32. Without gradient a whole layer is its products
with compiled code between them, around a residual in float32, whatever the weights are. Elsewhere
modules compute as they did. ``accelerate`` gives a module of ``KINDS`` a ``forward`` of its own,
a ``partial`` that is pickled and copied with it; ``restore`` takes it off again, which a shallow
copy (``nn.DataParallel``) needs first. Letters: T tokens, D width, H heads, E head width, F MLP.
"""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nvembed.kernels.attention import bfloat16_available, float32_available, plain_on_cpu
from nvembed.kernels.build import library
from nvembed.kernels.linear import fused_lora, is_plain_lora, linear

_UNIT = 16  # widths must be a multiple of it, head widths of twice as many


def available() -> bool:
    """Whether whole layers can compute so on this machine; compiles what they need."""
    return float32_available() and library("decoder_layer.cpp") is not None


def rms_norm(module: Any, x: Tensor) -> Tensor:
    """``weight · x / rms(x)``."""
    if not _supports(x, module.weight):
        out: Tensor = type(module).forward(module, x)
        return out
    return _Norm.apply(x, module.weight, module.variance_epsilon)


def gated_mlp(module: Any, x: Tensor) -> Tensor:
    """``down(silu(gate x) · up x)``."""
    if torch.compiler.is_compiling():
        out: Tensor = type(module).forward(module, x)
        return out
    gate, up = module.gate_proj(x), module.up_proj(x)
    out = module.down_proj(
        _Gate.apply(gate, up) if _supports(gate, up) else module.act_fn(gate) * up
    )
    return out


def is_silu(mlp: Any) -> bool:
    """Whether the gate of an MLP is SiLU."""
    return type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")


def fits_decoder_layer(layer: Any) -> bool:
    """Whether the widths and the activation of a layer are those of the compiled code."""
    widths = (layer.input_layernorm.weight.numel(), layer.mlp.gate_proj.weight.shape[0])
    return (
        all(width % _UNIT == 0 for width in widths)
        and layer.self_attn.head_dim % (2 * _UNIT) == 0
        and is_silu(layer.mlp)
    )


def decoder_layer(module: Any, hidden_states: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """Norm, attention with rotary positions, norm, gated MLP, each half added to the residual."""
    positions = options.get("position_embeddings")
    segments = options.get("segments")
    if arguments or positions is None or segments is None or not _runs(module, hidden_states):
        out: Tensor = type(module).forward(module, hidden_states, *arguments, **options)
        return out
    mlp, attention = module.mlp, module.self_attn
    dtype = mlp.gate_proj.weight.dtype
    residual_TD = hidden_states[0].to(torch.float32, copy=True)
    normed_TD = _add_norm(residual_TD, None, module.input_layernorm, dtype)
    # In bfloat16 where there is a kernel for it, else in float32: torch's own is slower.
    inner = dtype if bfloat16_available() else torch.float32
    query, key = (
        _rotate(project(normed_TD), positions, attention.head_dim, inner)
        for project in (attention.q_proj, attention.k_proj)
    )
    value = attention.v_proj(normed_TD).to(inner).unflatten(1, (-1, attention.head_dim))
    # The function that transformers would call.
    attend = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
    mixed_1THE, _ = attend(
        attention,
        *(x_THE.transpose(0, 1)[None] for x_THE in (query, key, value)),
        options.get("attention_mask"),
        segments=segments,
        causal=options["causal"],
        scaling=attention.scaling,
    )
    attended_TD = attention.o_proj(mixed_1THE[0].flatten(1).to(dtype))
    normed_TD = _add_norm(residual_TD, attended_TD, module.post_attention_layernorm, dtype)
    gated_TF = _gate(mlp.gate_proj(normed_TD), mlp.up_proj(normed_TD))
    return _add(residual_TD, mlp.down_proj(gated_TF))[None]


def _runs(layer: Any, hidden_1TD: Tensor) -> bool:
    attention, mlp = layer.self_attn, layer.mlp
    # Adapters and quantised weights are modules of other kinds.
    linears = (
        *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
    )
    if layer.training or torch.is_grad_enabled():
        return False
    dtype = getattr(mlp.gate_proj, "weight", hidden_1TD).dtype
    return (
        dtype in (torch.float32, torch.bfloat16)
        and all(isinstance(linear, nn.Linear) for linear in linears)
        and plain_on_cpu(dtype, *(linear.weight for linear in linears))
        and hidden_1TD.device.type == "cpu"
        and type(hidden_1TD) is Tensor
        and hidden_1TD.shape[0] == 1
        and not torch.is_autocast_enabled("cpu")
        and available()
    )


def _supports(*tensors: Tensor) -> bool:
    return (
        plain_on_cpu(torch.float32, *tensors)
        and all(x.shape[-1] % _UNIT == 0 for x in tensors)
        and not torch.is_autocast_enabled("cpu")
        and library("elementwise.cpp") is not None
    )


def _call(name: str, *arguments: Tensor | int | float | None) -> None:
    """Call a function of the compiled code; norms and gates alone go both ways."""
    source = "elementwise.cpp" if name.endswith(("forward", "backward")) else "decoder_layer.cpp"
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


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x, weight_D = x.contiguous(), weight_D.contiguous()
        out = torch.empty_like(x)
        inverse = x.new_empty(x.shape[:-1])
        shape = (inverse.numel(), x.shape[-1])
        _call("norm_forward", x, weight_D, out, inverse, *shape, float(eps))
        ctx.save_for_backward(x, weight_D, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, inverse = ctx.saved_tensors
        d_out = gradients[0].contiguous()
        d_x = torch.empty_like(x)
        shape = (inverse.numel(), x.shape[-1])
        _call("norm_backward", x, weight_D, inverse, d_out, d_x, *shape)
        d_weight_D = None
        if ctx.needs_input_grad[1]:
            d_weight_D = (d_out * x * inverse[..., None]).flatten(0, -2).sum(0)
        return d_x, d_weight_D, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        _call("gate_forward", gate, up, out, out.numel())
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_out = gradients[0].contiguous()
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        _call("gate_backward", gate, up, d_out, d_gate, d_up, gate.numel())
        return d_gate, d_up


def _add_norm(
    residual_TD: Tensor, added_TD: Tensor | None, norm: Any, dtype: torch.dtype
) -> Tensor:
    """Add to the residual in place, and return its norm in ``dtype``."""
    if added_TD is not None:
        added_TD = added_TD.contiguous()
    out_TD = torch.empty(residual_TD.shape, dtype=dtype)
    weight_D = norm.weight.float().contiguous()
    rows, width = residual_TD.shape
    eps, wide = float(norm.variance_epsilon), dtype is torch.float32
    _call("add_norm", residual_TD, added_TD, weight_D, out_TD, wide, rows, width, eps)
    return out_TD


def _gate(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    gate_TF, up_TF = gate_TF.contiguous(), up_TF.contiguous()
    out_TF = torch.empty_like(gate_TF)
    _call("gate", gate_TF, up_TF, out_TF, gate_TF.dtype is torch.float32, out_TF.numel())
    return out_TF


def _add(residual_TD: Tensor, added_TD: Tensor) -> Tensor:
    """Add to the residual in place."""
    added_TD = added_TD.contiguous()
    _call("add", residual_TD, added_TD, added_TD.dtype is torch.float32, *residual_TD.shape)
    return residual_TD


def _rotate(
    x_TI: Tensor, positions: tuple[Tensor, Tensor], width: int, dtype: torch.dtype
) -> Tensor:
    """Rotary positions ``(1, T, E)`` on ``(T, H · E)``; returns ``(T, H, E)`` in ``dtype``."""
    x_TI = x_TI.contiguous()
    cos_TE, sin_TE = (angles[0].to(x_TI.dtype).contiguous() for angles in positions)
    tokens, heads = x_TI.shape[0], x_TI.shape[1] // width
    out_THE = torch.empty(tokens, heads, width, dtype=dtype)
    wide, wide_out = x_TI.dtype is torch.float32, dtype is torch.float32
    shape = (tokens, heads, width, cos_TE.shape[1])
    _call("rotate", x_TI, cos_TE, sin_TE, out_THE, wide, wide_out, *shape)
    return out_THE


# --- Which modules compute so ---------------------------------------------------------------------


class Kind(NamedTuple):
    """What computes in place of a class's forward, and for which of its modules."""

    forward: Callable[..., Any]
    fits: Callable[[Any], bool] = lambda module: True


def _transformers(name: str, *families: str) -> list[str]:
    return [f"transformers.models.{f.lower()}.modeling_{f.lower()}.{f}{name}" for f in families]


_ROTARY = ("Llama", "Mistral", "Qwen2")

# Class → what computes in its place. A decoder layer of these families is norm, attention with
# rotary positions, norm, gated MLP, and nothing else.
KINDS: dict[str, Kind] = {
    "torch.nn.modules.linear.Linear": Kind(linear),
    "peft.tuners.lora.layer.Linear": Kind(fused_lora, is_plain_lora),
    **dict.fromkeys(_transformers("RMSNorm", *_ROTARY, "Qwen3"), Kind(rms_norm)),
    **dict.fromkeys(_transformers("MLP", *_ROTARY, "Qwen3"), Kind(gated_mlp, is_silu)),
    **dict.fromkeys(
        _transformers("DecoderLayer", *_ROTARY), Kind(decoder_layer, fits_decoder_layer)
    ),
}


def accelerate(model: nn.Module) -> Counter[str]:
    """Let a model compute by the kernels, in place; count the modules by what computes them.

    Modules whose forward is another library's hook already are left alone.
    """
    counts: Counter[str] = Counter()
    for module in model.modules():
        cls = type(module)
        kind = KINDS.get(f"{cls.__module__}.{cls.__qualname__}")
        if kind is not None and "forward" not in vars(module) and kind.fits(module):
            module.forward = partial(kind.forward, module)
            counts[kind.forward.__name__] += 1
    return counts


def restore(model: nn.Module) -> None:
    """Give every module the forward of its class again, in place."""
    for module in model.modules():
        if _is_ours(module):
            del module.forward


def _is_ours(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    return isinstance(forward, partial) and forward.func in _FORWARDS


def compile_elementwise(backbone: nn.Module) -> int:
    """Compile the norms and gated MLPs of a backbone, in place; return how many.

    Products and attention stay: their libraries do better than generated code. Compiled once per
    process, for all lengths, which needs a C++ compiler on a CPU and takes some seconds.
    """
    count = 0
    for module in backbone.modules():
        name = type(module).__name__
        if name.endswith(("RMSNorm", "MLP")) and (
            "forward" not in vars(module) or _is_ours(module)
        ):
            function = compiled_norm if name.endswith("RMSNorm") else compiled_mlp
            module.forward = partial(function, module)
            count += 1
    return count


def compiled_norm(module: Any, x: Tensor) -> Tensor:
    """The norm of its class, compiled."""
    out: Tensor = _compiled(type(module).forward)(module, x)
    return out


def compiled_mlp(module: Any, x: Tensor) -> Tensor:
    """``down(act(gate x) · up x)``, the form of the gated MLPs of transformers."""
    gated = _compiled(_activated)(module.act_fn, module.gate_proj(x), module.up_proj(x))
    out: Tensor = module.down_proj(gated)
    return out


def _activated(activation: Any, gate: Tensor, up: Tensor) -> Tensor:
    out: Tensor = activation(gate) * up
    return out


@cache
def _compiled(function: Any) -> Any:
    # On first use: importing the compiler takes seconds.
    return torch.compile(function, dynamic=True)


_FORWARDS = {kind.forward for kind in KINDS.values()} | {compiled_norm, compiled_mlp}

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT = 256 << 20
_LARGEST_REUSED = 32 << 20  # the most that glibc allows


@cache
def keep_freed_memory() -> None:
    """Let up to 256 MB of freed memory stay with this process, for buffers of up to 32 MB.

    By default glibc returns them and gets fresh pages, which have to be cleared: a third of the
    time of encoding in float32 (docs/results.md). Settings of the environment go before.
    """
    if "MALLOC_TRIM_THRESHOLD_" in os.environ or "GLIBC_TUNABLES" in os.environ:
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # no glibc
        return
    mallopt(_MMAP_THRESHOLD, _LARGEST_REUSED)
    mallopt(_TRIM_THRESHOLD, _KEPT)
