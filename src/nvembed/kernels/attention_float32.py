"""Attention in float32 on a CPU by the kernel of ``native/varlen_attention.cpp``.

It takes the whole pack at once, whatever the lengths of its segments, reads queries, keys and
values where they lie, and keeps nothing as large as the scores: of a forward pass, one number per
token and head for the backward pass. What it gains over torch's kernels is in docs/results.md.

Letters: T tokens of the pack, H heads, K key/value heads (a divisor of H), E head width.
"""

from __future__ import annotations

import ctypes
import logging
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nvembed.core.errors import ModelError
from nvembed.kernels.build import attention_library
from nvembed.kernels.cpu import this_cpu
from nvembed.text.packing import Segments

WIDTH_UNIT = 16
"""Head widths must be a multiple of it."""

TOLERANCE = 1e-4
"""Of the check when the kernel is loaded, relative to the largest number."""

_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64
_SHAPE: list[Any] = [_INTEGER] * 4 + [ctypes.c_float, ctypes.c_int]
_log = logging.getLogger(__name__)


def available() -> bool:
    """Whether there is a kernel on this machine; compiles it where there is not yet one."""
    return _kernel() is not None


def takes(query_HTE: Tensor, key_KTE: Tensor, value_KTE: Tensor) -> bool:
    """Whether the kernel computes attention of these: bidirectional, no dropout, no soft cap."""
    num_heads, _, width = query_HTE.shape
    plain = all(
        # A subclass has no memory of its own, or computes otherwise.
        type(x) in (Tensor, nn.Parameter) and x.dtype is torch.float32 and x.device.type == "cpu"
        for x in (query_HTE, key_KTE, value_KTE)
    )
    return (
        plain
        and width % WIDTH_UNIT == 0
        and key_KTE.shape == value_KTE.shape
        and key_KTE.shape[1:] == query_HTE.shape[1:]
        and num_heads % key_KTE.shape[0] == 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and available()
    )


def native_attention(
    query_HTE: Tensor,
    key_KTE: Tensor,
    value_KTE: Tensor,
    segments: Segments,
    scaling: float | None = None,
) -> Tensor:
    """Attention within each segment, ``(T, H, E)``, differentiable in all three tensors.

    Args:
        query_HTE: queries. Of all three only the last dimension must lie without gaps; they are
            copied where it does not.
        key_KTE: keys.
        value_KTE: values.
        segments: boundaries; they cover all T tokens.
        scaling: of the scores; ``None`` is one over the root of E.

    Raises:
        ModelError: the scaling is not above 0.
    """
    if sum(segments.lengths) != query_HTE.shape[1]:
        raise ValueError(f"segments cover {sum(segments.lengths)} of {query_HTE.shape[1]} tokens")
    kernel = _kernel()
    assert kernel is not None
    scale = checked_scaling(scaling, query_HTE.shape[-1])
    starts = segments.cu_seqlens.to("cpu", torch.int32).contiguous()
    out_THE: Tensor = _Attention.apply(query_HTE, key_KTE, value_KTE, starts, scale, kernel)
    return out_THE


def checked_scaling(scaling: float | None, width: int) -> float:
    """Return what scores are multiplied by; ``None`` is one over the root of the head width.

    Raises:
        ModelError: it is not above 0, or no number.
    """
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


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        starts: Tensor,
        scale: float,
        kernel: _Kernel,
    ) -> Tensor:
        inputs = [_dense_rows(x_HTE) for x_HTE in (query, key, value)]
        num_heads, num_tokens, width = query.shape
        out_THE = query.new_empty(num_tokens, num_heads, width)
        log_sum_HT = query.new_empty(num_heads, num_tokens)
        kernel.forward(inputs, starts, scale, (out_THE, log_sum_HT))
        ctx.save_for_backward(*inputs, out_THE, log_sum_HT)
        ctx.starts, ctx.scale, ctx.kernel = starts, scale, kernel
        return out_THE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out_THE, log_sum_HT = ctx.saved_tensors
        d_out_HTE = _dense_rows(gradients[0].transpose(0, 1))
        found = [x.new_empty(x.shape[1], x.shape[0], x.shape[2]) for x in (query, key, value)]
        inputs = [query, key, value, d_out_HTE]
        ctx.kernel.backward(inputs, ctx.starts, ctx.scale, (out_THE, log_sum_HT, *found))
        return (*(x_THE.transpose(0, 1) for x_THE in found), None, None, None)


def _dense_rows(x_HTE: Tensor) -> Tensor:
    return x_HTE if x_HTE.stride(-1) == 1 else x_HTE.contiguous()


class _Kernel:
    """The two functions of the library, for tensors."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._forward = library.nvembed_attention_forward
        self._forward.argtypes = [*[_POINTER] * 5, *_SHAPE, *[_POINTER] * 2]
        self._backward = library.nvembed_attention_backward
        self._backward.argtypes = [*[_POINTER] * 6, *_SHAPE, *[_POINTER] * 5]

    def forward(
        self, inputs: Sequence[Tensor], starts: Tensor, scale: float, results: Sequence[Tensor]
    ) -> None:
        """Queries, keys and values into outputs ``(T, H, E)`` and logarithms of sums ``(H, T)``."""
        self._call(self._forward, inputs, starts, scale, results)

    def backward(
        self, inputs: Sequence[Tensor], starts: Tensor, scale: float, results: Sequence[Tensor]
    ) -> None:
        """Inputs with the gradient of the output, and the results of ``forward``, into gradients.

        The gradients are ``(T, H, E)`` and twice ``(T, K, E)``.
        """
        self._call(self._backward, inputs, starts, scale, results)

    def _call(
        self,
        function: Any,
        inputs: Sequence[Tensor],
        starts: Tensor,
        scale: float,
        results: Sequence[Tensor],
    ) -> None:
        query_HTE, key_KTE = inputs[:2]
        strides = [stride for x_HTE in inputs for stride in (x_HTE.stride(1), x_HTE.stride(0))]
        failed = function(
            *(x_HTE.data_ptr() for x_HTE in inputs),
            (ctypes.c_int64 * len(strides))(*strides),
            starts.data_ptr(),
            len(starts) - 1,
            query_HTE.shape[0],
            key_KTE.shape[0],
            query_HTE.shape[2],
            scale,
            torch.get_num_threads(),
            *(x.data_ptr() for x in results),
        )
        if failed:
            raise MemoryError("no memory for the scores of a block of attention")


@cache
def _kernel() -> _Kernel | None:
    """The kernel where it can be had, computes rightly and is faster than torch's."""
    if not this_cpu().has_wide_registers:
        _log.info("attention is torch's own: on this CPU the compiled one is no faster")
        return None
    library = attention_library()
    if library is None:
        return None
    kernel = _Kernel(library)
    worst = _largest_error(kernel)
    if not worst < TOLERANCE:
        _log.warning("attention is torch's own: the compiled one is wrong by %.1e", worst)
        return None
    return kernel


def _largest_error(kernel: _Kernel) -> float:
    """Of outputs and gradients in a small example: compilers have errors too."""
    random = torch.Generator().manual_seed(0)
    query, key, value, d_out = (
        torch.randn(heads, 37, 32, generator=random) for heads in (2, 1, 1, 2)
    )
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [x_HTE.double().clone().requires_grad_() for x_HTE in (query, key, value)]
        weights = (leaves[0] @ leaves[1].transpose(1, 2)).softmax(-1)
        wanted = weights @ leaves[2]
        gradients = torch.autograd.grad(wanted, leaves, d_out.double())
    out, log_sum = torch.empty(37, 2, 32), torch.empty(2, 37)
    found = [torch.empty(37, heads, 32) for heads in (2, 1, 1)]
    starts = torch.tensor([0, 37], dtype=torch.int32)
    kernel.forward((query, key, value), starts, 1.0, (out, log_sum))
    kernel.backward((query, key, value, d_out), starts, 1.0, (out, log_sum, *found))
    return max(
        float((left.transpose(0, 1) - right).abs().max() / right.abs().max())
        for left, right in zip((out, *found), (wanted.detach(), *gradients), strict=True)
    )
