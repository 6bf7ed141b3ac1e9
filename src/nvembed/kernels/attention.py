"""Attention on a CPU by compiled kernels: float32 with gradients, bfloat16 without.

The first is bidirectional and for CPUs with AVX-512, the second for those with AVX512-BF16. Both
take a whole pack at once and keep nothing as large as the scores; sums and softmax are float32.
Letters: T tokens, N segments, H heads, K key/value heads (a divisor of H), E head width.
"""

from __future__ import annotations

import ctypes
import logging
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nvembed.core.errors import ModelError
from nvembed.kernels.build import library, this_cpu

# Head widths must be a multiple of these.
_FLOAT32_UNIT, _BFLOAT16_UNIT = 16, 32

# Of the checks when a kernel is loaded, relative to the largest number.
FLOAT32_TOLERANCE, BFLOAT16_TOLERANCE = 1e-4, 0.02

_log = logging.getLogger(__name__)


def float32_available() -> bool:
    """Whether there is a float32 kernel here; compiles it where there is not yet one."""
    return _float32_kernel() is not None


def bfloat16_available() -> bool:
    """Whether there is a bfloat16 kernel here; compiles it where there is not yet one."""
    return _bfloat16_kernel() is not None


def supports_float32(query_HTE: Tensor, key_KTE: Tensor, value_KTE: Tensor) -> bool:
    """Whether the float32 kernel computes these: bidirectional, no dropout, no soft cap."""
    return (
        _fit(torch.float32, _FLOAT32_UNIT, query_HTE, key_KTE, value_KTE)
        and not torch.is_autocast_enabled("cpu")
        and float32_available()
    )


def supports_bfloat16(query_HTE: Tensor, key_KTE: Tensor, value_KTE: Tensor) -> bool:
    """Whether the bfloat16 kernel computes these: no gradient, no dropout, no soft cap."""
    tensors = (query_HTE, key_KTE, value_KTE)
    return (
        _fit(torch.bfloat16, _BFLOAT16_UNIT, *tensors)
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
        and bfloat16_available()
    )


def plain_on_cpu(dtype: torch.dtype, *tensors: Tensor) -> bool:
    """Whether compiled code can read these; a subclass may have no memory of its own."""
    return not torch.compiler.is_compiling() and all(
        type(x) in (Tensor, nn.Parameter) and x.dtype is dtype and x.device.type == "cpu"
        for x in tensors
    )


def _fit(dtype: torch.dtype, unit: int, query: Tensor, key: Tensor, value: Tensor) -> bool:
    return (
        plain_on_cpu(dtype, query, key, value)
        and query.shape[-1] % unit == 0
        and key.shape == value.shape
        and key.shape[1:] == query.shape[1:]
        and query.shape[0] % key.shape[0] == 0
    )


def float32_attention(
    query_HTE: Tensor,
    key_KTE: Tensor,
    value_KTE: Tensor,
    starts: Tensor,
    scaling: float | None = None,
) -> Tensor:
    """Attention within each segment, ``(T, H, E)``, differentiable in all three tensors.

    ``starts`` ``(N + 1,)`` are the first tokens of the segments, then T.
    """
    scale = checked_scaling(scaling, query_HTE.shape[-1])
    starts = _checked_starts(starts, query_HTE)
    return _Attention.apply(_float32_kernel(), starts, scale, query_HTE, key_KTE, value_KTE)


def bfloat16_attention(
    query_HTE: Tensor,
    key_KTE: Tensor,
    value_KTE: Tensor,
    starts: Tensor,
    *,
    causal: bool,
    scaling: float | None = None,
) -> Tensor:
    """Attention within each segment without gradient; see ``float32_attention``."""
    scale = checked_scaling(scaling, query_HTE.shape[-1])
    starts = _checked_starts(starts, query_HTE)
    return _bfloat16(_bfloat16_kernel(), (query_HTE, key_KTE, value_KTE), starts, scale, causal)


def checked_scaling(scaling: float | None, width: int) -> float:
    """Return what scores are multiplied by; ``None`` is one over the root of the head width."""
    if scaling is None:
        return float(width**-0.5)
    if not 0 < scaling < math.inf:
        raise ModelError(
            f"attention scores are scaled by {scaling}",
            where="config.json",
            expected="a factor above 0",
            hint="Correct the model's configuration",
        )
    return float(scaling)


def _checked_starts(starts: Tensor, query_HTE: Tensor) -> Tensor:
    starts = starts.to("cpu", torch.int32).contiguous()
    if int(starts[-1]) != query_HTE.shape[1]:
        raise ValueError(f"segments cover {int(starts[-1])} of {query_HTE.shape[1]} tokens")
    return starts


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Any, starts: Tensor, scale: float, *qkv: Tensor) -> Tensor:
        inputs = [_dense_rows(x_HTE) for x_HTE in qkv]
        num_heads, num_tokens, width = inputs[0].shape
        out_THE = inputs[0].new_empty(num_tokens, num_heads, width)
        log_sum_HT = inputs[0].new_empty(num_heads, num_tokens)  # of softmax
        _call(kernel.nvembed_attention_forward, inputs, starts, scale, [out_THE, log_sum_HT])
        ctx.save_for_backward(*inputs, out_THE, log_sum_HT)
        ctx.kernel, ctx.starts, ctx.scale = kernel, starts, scale
        return out_THE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *qkv, out_THE, log_sum_HT = ctx.saved_tensors
        found = [x_HTE.new_empty(x_HTE.transpose(0, 1).shape) for x_HTE in qkv]
        inputs = [*qkv, _dense_rows(gradients[0].transpose(0, 1))]
        results = [out_THE, log_sum_HT, *found]
        _call(ctx.kernel.nvembed_attention_backward, inputs, ctx.starts, ctx.scale, results)
        return (None, None, None, *(x_THE.transpose(0, 1) for x_THE in found))


def _bfloat16(
    kernel: Any, inputs: Sequence[Tensor], starts: Tensor, scale: float, causal: bool
) -> Tensor:
    num_heads, num_tokens, width = inputs[0].shape
    out_THE = torch.empty(num_tokens, num_heads, width, dtype=torch.bfloat16)
    dense = [_dense_rows(x_HTE) for x_HTE in inputs]
    _call(kernel.nvembed_bfloat16_attention, dense, starts, scale, [out_THE], causal)
    return out_THE


def _dense_rows(x_HTE: Tensor) -> Tensor:
    return x_HTE if x_HTE.stride(-1) == 1 else x_HTE.contiguous()


def _call(
    function: Any,
    inputs: Sequence[Tensor],
    starts: Tensor,
    scale: float,
    results: Sequence[Tensor],
    *flags: bool,
) -> None:
    query_HTE, key_KTE = inputs[:2]
    strides = [stride for x_HTE in inputs for stride in (x_HTE.stride(1), x_HTE.stride(0))]
    shape = (len(starts) - 1, query_HTE.shape[0], key_KTE.shape[0], query_HTE.shape[2])
    failed = function(
        *(ctypes.c_void_p(x_HTE.data_ptr()) for x_HTE in inputs),
        (ctypes.c_int64 * len(strides))(*strides),
        ctypes.c_void_p(starts.data_ptr()),
        *map(ctypes.c_int64, shape),
        ctypes.c_float(scale),
        *map(ctypes.c_int, (*flags, torch.get_num_threads())),
        *(ctypes.c_void_p(x.data_ptr()) for x in results),
    )
    if failed:
        raise MemoryError("no memory for the scores of a block of attention")


@cache
def _float32_kernel() -> Any | None:
    """The library where it can be had, computes rightly and is faster than torch's."""
    if not this_cpu().has_wide_registers:
        _log.info("attention is torch's own: on this CPU the compiled one is no faster")
        return None
    found = library("varlen_attention.cpp")
    if found is None:
        return None
    error = _error(torch.float32, lambda qkv, starts: _Attention.apply(found, starts, 1.0, *qkv))
    return _if_right(found, error, FLOAT32_TOLERANCE)


@cache
def _bfloat16_kernel() -> Any | None:
    """The library where it can be had, this CPU runs it, and it computes rightly."""
    found: Any = library("bfloat16_attention.cpp")
    if found is None or not found.nvembed_bfloat16_supported():
        return None
    error = _error(torch.bfloat16, lambda qkv, starts: _bfloat16(found, qkv, starts, 1.0, False))
    return _if_right(found, error, BFLOAT16_TOLERANCE)


# Both are tried on a small example when they are loaded: compilers have errors too.
def _if_right(kernel: Any, error: float, tolerance: float) -> Any | None:
    if error < tolerance:
        return kernel
    _log.warning("attention is torch's own: the compiled one is wrong by %.1e", error)
    return None


@torch.inference_mode(False)
@torch.enable_grad()
def _error(dtype: torch.dtype, attend: Callable[..., Tensor]) -> float:
    """Of an example, relative to float64: that of the result, and in float32 of its gradients."""
    random = torch.Generator().manual_seed(0)
    numbers = [torch.randn(heads, 37, 32, generator=random).to(dtype) for heads in (2, 1, 1)]
    exact = [x_HTE.double().requires_grad_() for x_HTE in numbers]
    leaves = [x_HTE.requires_grad_() for x_HTE in numbers]
    query_HTE, key_HTE, value_HTE = exact
    found = [attend(leaves, torch.tensor([0, 37], dtype=torch.int32)).transpose(0, 1)]
    wanted = [(query_HTE @ key_HTE.transpose(1, 2)).softmax(-1) @ value_HTE]
    if dtype is torch.float32:
        d_out = torch.randn(wanted[0].shape, generator=torch.Generator().manual_seed(1))
        found += torch.autograd.grad(found[0], leaves, d_out)
        wanted += torch.autograd.grad(wanted[0], exact, d_out.double())
    return max(
        float((left - right).detach().abs().max() / right.detach().abs().max())
        for left, right in zip(found, wanted, strict=True)
    )
