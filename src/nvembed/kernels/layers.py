"""Norms, MLPs, attention and decoder layers on a CPU by compiled code; the one hook of all kernels.

Norms, gates and rotary positions take one pass each way (``functions.py``). Without gradient a
whole layer is its products with compiled code between them, around a residual in float32, whatever
the weights are. Elsewhere modules compute as they did. ``accelerate`` gives a module of ``KINDS`` a
``forward`` of its own, a ``partial`` that is pickled and copied with it; ``restore`` takes it off
again, which a shallow copy (``nn.DataParallel``) needs first. Letters: T tokens, D width, H heads,
E head width, F MLP.
"""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nvembed.kernels.attention import bfloat16_available, float32_available, plain_on_cpu
from nvembed.kernels.build import library
from nvembed.kernels.functions import (
    SOURCE,
    UNIT,
    Rotated,
    call,
    fits,
    gated,
    linear,
    normed,
    rotate,
)
from nvembed.kernels.int8 import Int8Linear
from nvembed.kernels.packed import PackedLinear
from nvembed.kernels.trained import (
    fused_lora,
    gated_linear,
    is_plain_lora,
    is_watched,
    linears,
    trained_norm,
)

_LAYER = "decoder_layer.cpp"
_HELD = (Int8Linear, PackedLinear)  # in another form than a tensor of their type


def available() -> bool:
    """Whether whole layers can compute so on this machine; compiles what they need."""
    return float32_available() and None not in (library(SOURCE), library(_LAYER))


def rms_norm(module: Any, x: Tensor) -> Tensor:
    """``weight · x / rms(x)``."""
    if not fits(x, module.weight):
        return type(module).forward(module, x)
    if torch.is_grad_enabled():
        return trained_norm(x, module.weight, module.variance_epsilon)
    return normed(x, module.weight, module.variance_epsilon, x.dtype)[0]


def gated_mlp(module: Any, x: Tensor, norm: Any = None) -> Tensor:
    """``down(silu(gate x) · up x)`` of x or its norm."""
    if torch.compiler.is_compiling():
        return type(module).forward(module, x)
    opened, up = linears(x, (module.gate_proj, module.up_proj), norm)
    if fits(opened, up):
        return gated_linear(opened, up, module.down_proj)
    return module.down_proj(module.act_fn(opened) * up)


def is_silu(mlp: Any) -> bool:
    """Whether the gate of an MLP is SiLU."""
    return type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")


def fits_decoder_layer(layer: Any) -> bool:
    """Whether the widths and the activation of a layer are those of the compiled code."""
    widths = (layer.input_layernorm.weight.numel(), layer.mlp.gate_proj.weight.shape[0])
    return (
        all(width % UNIT == 0 for width in widths)
        and layer.self_attn.head_dim % (2 * UNIT) == 0
        and is_silu(layer.mlp)
    )


def decoder_layer(module: Any, hidden_states: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """Norm, attention with rotary positions, norm, gated MLP, each half added to the residual."""
    positions = options.get("position_embeddings")
    segments = options.get("segments")
    mlp, attention = module.mlp, module.self_attn
    if arguments or positions is None or segments is None or not _runs(module, hidden_states):
        if arguments or not _may_join(module) or not _is_flat(hidden_states, options):
            return type(module).forward(module, hidden_states, *arguments, **options)
        mixed, _ = rotary_attention(
            attention, hidden_states, norm=module.input_layernorm, **options
        )
        hidden_states = hidden_states + mixed
        return hidden_states + gated_mlp(mlp, hidden_states, module.post_attention_layernorm)
    dtype = _dtype_of(mlp.gate_proj)
    residual_TD = hidden_states[0].to(torch.float32, copy=True)
    normed_TD = _add_norm(residual_TD, None, module.input_layernorm, dtype)
    # In bfloat16 where there is a kernel for it, else in float32: torch's own is slower.
    inner = dtype if bfloat16_available() else torch.float32
    cos_TA, sin_TA = (angles_1TA[0] for angles_1TA in positions)
    query, key = (
        rotate(project(normed_TD), cos_TA, sin_TA, attention.head_dim, inner)
        for project in (attention.q_proj, attention.k_proj)
    )
    value = attention.v_proj(normed_TD).to(inner).unflatten(1, (-1, attention.head_dim))
    mixed_1THE, _ = _attend(attention, (query, key, value), options)
    attended_TD = attention.o_proj(mixed_1THE[0].flatten(1).to(dtype))
    normed_TD = _add_norm(residual_TD, attended_TD, module.post_attention_layernorm, dtype)
    gated_TF = gated(mlp.gate_proj(normed_TD), mlp.up_proj(normed_TD))
    return _add(residual_TD, mlp.down_proj(gated_TF))[None]


def rotary_attention(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    norm: Any = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of a flat batch with rotary positions, ``(1, T, D)`` → ``(1, T, D)``.

    Where a ``norm`` is given, of what that makes of the states.
    """
    given = {"position_embeddings": position_embeddings, "attention_mask": attention_mask}
    if position_embeddings is None or not _is_flat(hidden_states, options | given):
        return type(module).forward(
            module, hidden_states, position_embeddings, attention_mask, **options
        )
    width = module.head_dim
    projections = (module.q_proj, module.k_proj, module.v_proj)
    query, key, value = (x_1TI[0] for x_1TI in linears(hidden_states, projections, norm))
    angles = [angle_1TA[0] for angle_1TA in position_embeddings]
    dropout = module.attention_dropout if module.training else 0.0
    turned = [
        Rotated.apply(x_TI, *angles, width) if fits(x_TI) else _turned(x_TI, angles, width)
        for x_TI in (query, key)
    ]
    heads = (*turned, value.unflatten(1, (-1, width)))
    mixed_1THE, weights = _attend(module, heads, options | {"dropout": dropout})
    return module.o_proj(mixed_1THE.flatten(2)), weights


def _is_flat(hidden_states: Tensor, options: Mapping[str, Any]) -> bool:
    """Whether attention is asked for one flat batch on a CPU, as a plain call."""
    unwanted = ("attention_mask", "cache", "past_key_values")
    return (
        "segments" in options
        and options.get("position_embeddings") is not None
        and all(options.get(name) is None for name in unwanted)
        and hidden_states.device.type == "cpu"
        and not torch.compiler.is_compiling()
    )


def _may_join(layer: Any) -> bool:
    """Whether all parts of a layer compute by the kernels, so that they may be computed as one."""
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    parts = {layer.self_attn: rotary_attention, layer.mlp: gated_mlp}
    return all(
        _is_ours(part) and vars(part)["forward"].func is forward and not is_watched(part)
        for part, forward in (parts | dict.fromkeys(norms, rms_norm)).items()
    )


def _turned(x_TI: Tensor, angles: Sequence[Tensor], width: int) -> Tensor:
    """What ``rotate`` computes, by torch, for types that the compiled code does not know."""
    cos_T1A, sin_T1A = (angle_TA[:, None] for angle_TA in angles)
    x_THE = x_TI.unflatten(1, (-1, width))
    first, second = x_THE.chunk(2, dim=-1)
    return x_THE * cos_T1A + torch.cat((-second, first), dim=-1) * sin_T1A


def _attend(
    attention: Any, heads: Sequence[Tensor], options: Mapping[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Mix ``(T, H, E)`` heads by the function that transformers would call."""
    attend = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
    return attend(
        attention,
        *(x_THE.transpose(0, 1)[None] for x_THE in heads),
        options.get("attention_mask"),  # which ours refuses
        segments=options["segments"],
        causal=options["causal"],
        scaling=attention.scaling,
        dropout=options.get("dropout", 0.0),
    )


def fits_rotary_attention(attention: Any) -> bool:
    """Whether the head width is one of the compiled code."""
    return bool(attention.head_dim % (2 * UNIT) == 0)


def _runs(layer: Any, hidden_1TD: Tensor) -> bool:
    attention, mlp = layer.self_attn, layer.mlp
    # Adapters and quantised weights are modules of other kinds.
    linears = (
        *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
    )
    if layer.training or torch.is_grad_enabled():
        return False
    dtype = _dtype_of(mlp.gate_proj)
    plain = [linear for linear in linears if not isinstance(linear, _HELD)]
    return (
        dtype in (torch.float32, torch.bfloat16)
        and all(isinstance(linear, nn.Linear) for linear in plain)
        and plain_on_cpu(dtype, *(linear.weight for linear in plain))
        and hidden_1TD.device.type == "cpu"
        and type(hidden_1TD) is Tensor
        and hidden_1TD.shape[0] == 1
        and not torch.is_autocast_enabled("cpu")
        and available()
    )


def _dtype_of(linear: Any) -> Any:
    """The type of what a linear layer takes and gives; None of a module of another kind."""
    holder = linear if isinstance(linear, _HELD) else getattr(linear, "weight", None)
    return getattr(holder, "dtype", None)


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
    call(_LAYER, "add_norm", residual_TD, added_TD, weight_D, out_TD, wide, rows, width, eps)
    return out_TD


def _add(residual_TD: Tensor, added_TD: Tensor) -> Tensor:
    """Add to the residual in place."""
    added_TD = added_TD.contiguous()
    call(_LAYER, "add", residual_TD, added_TD, added_TD.dtype is torch.float32, *residual_TD.shape)
    return residual_TD


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
        _transformers("Attention", *_ROTARY), Kind(rotary_attention, fits_rotary_attention)
    ),
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
    return _compiled(type(module).forward)(module, x)


def compiled_mlp(module: Any, x: Tensor) -> Tensor:
    """``down(act(gate x) · up x)``, the form of the gated MLPs of transformers."""
    gated = _compiled(_activated)(module.act_fn, module.gate_proj(x), module.up_proj(x))
    return module.down_proj(gated)


def _activated(activation: Any, gate: Tensor, up: Tensor) -> Tensor:
    return activation(gate) * up


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
