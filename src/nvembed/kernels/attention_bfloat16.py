"""Attention in bfloat16 without gradient on a CPU, by ``native/bfloat16_attention.cpp``.

For CPUs with AVX512-BF16; products take bfloat16 and sum in float32, softmax is float32. The kernel
for float32, which training uses too, is ``kernels/attention_float32.py``.

Letters: T tokens of the pack, H heads, K key/value heads (a divisor of H), E head width.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nvembed.kernels.attention_float32 import checked_scaling
from nvembed.kernels.build import NativeError, load_named
from nvembed.text.packing import Segments

WIDTH_UNIT = 32
"""Head widths must be a multiple of it."""

TOLERANCE = 0.02
"""Of the check when the kernel is loaded, relative to the largest number."""

_log = logging.getLogger(__name__)


def available() -> bool:
    """Whether there is a kernel on this machine; compiles it where there is not yet one."""
    return _kernel() is not None


def takes(query_HTE: Tensor, key_KTE: Tensor, value_KTE: Tensor) -> bool:
    """Whether the kernel computes attention of these: no gradient, no dropout, no soft cap."""
    num_heads, _, width = query_HTE.shape
    tensors = (query_HTE, key_KTE, value_KTE)
    plain = all(
        # A subclass has no memory of its own, or computes otherwise.
        type(x) is Tensor and x.dtype is torch.bfloat16 and x.device.type == "cpu"
        for x in tensors
    )
    return (
        plain
        and width % WIDTH_UNIT == 0
        and key_KTE.shape == value_KTE.shape
        and key_KTE.shape[1:] == query_HTE.shape[1:]
        and num_heads % key_KTE.shape[0] == 0
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
        and not torch.compiler.is_compiling()
        and available()
    )


def bfloat16_attention(
    query_HTE: Tensor,
    key_KTE: Tensor,
    value_KTE: Tensor,
    segments: Segments,
    *,
    causal: bool,
    scaling: float | None = None,
) -> Tensor:
    """Attention within each segment, ``(T, H, E)`` in bfloat16.

    Args:
        query_HTE: queries. Of all three only the last dimension must lie without gaps; they are
            copied where it does not.
        key_KTE: keys.
        value_KTE: values.
        segments: boundaries; they cover all T tokens.
        causal: a token sees itself and what came before it only.
        scaling: of the scores; ``None`` is one over the root of E.

    Raises:
        ModelError: the scaling is not above 0.
    """
    if sum(segments.lengths) != query_HTE.shape[1]:
        raise ValueError(f"segments cover {sum(segments.lengths)} of {query_HTE.shape[1]} tokens")
    kernel = _kernel()
    assert kernel is not None
    starts = segments.cu_seqlens.to("cpu", torch.int32).contiguous()
    return _attend(kernel, (query_HTE, key_KTE, value_KTE), starts, causal, scaling)


def _attend(
    kernel: Any,
    inputs: tuple[Tensor, Tensor, Tensor],
    starts: Tensor,
    causal: bool,
    scaling: float | None,
) -> Tensor:
    inputs_HTE = [x if x.stride(-1) == 1 else x.contiguous() for x in inputs]
    num_heads, num_tokens, width = inputs_HTE[0].shape
    out_THE = torch.empty(num_tokens, num_heads, width, dtype=torch.bfloat16)
    strides = [stride for x_HTE in inputs_HTE for stride in (x_HTE.stride(1), x_HTE.stride(0))]
    failed = kernel(
        *(ctypes.c_void_p(x_HTE.data_ptr()) for x_HTE in inputs_HTE),
        (ctypes.c_int64 * len(strides))(*strides),
        ctypes.c_void_p(starts.data_ptr()),
        *map(ctypes.c_int64, (len(starts) - 1, num_heads, inputs_HTE[1].shape[0], width)),
        ctypes.c_float(checked_scaling(scaling, width)),
        ctypes.c_int(causal),
        ctypes.c_int(torch.get_num_threads()),
        ctypes.c_void_p(out_THE.data_ptr()),
    )
    if failed:
        raise MemoryError("no memory for the scores of a block of attention")
    return out_THE


@cache
def _kernel() -> Any | None:
    """The kernel where it can be had and computes rightly."""
    try:
        library = load_named("bfloat16_attention.cpp")
    except NativeError as error:
        _log.info("attention in bfloat16 is torch's own: %s", error)
        return None
    if not library.nvembed_bfloat16_supported():
        return None
    kernel = library.nvembed_bfloat16_attention
    worst = _largest_error(kernel)
    if not worst < TOLERANCE:
        _log.warning("attention in bfloat16 is torch's own: ours is wrong by %.1e", worst)
        return None
    return kernel


def _largest_error(kernel: Any) -> float:
    """In a small example: compilers have errors too."""
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(h, 37, 32, generator=random).bfloat16() for h in (2, 1, 1))
    wanted_HTE = (query.double() @ key.double().transpose(1, 2)).softmax(-1) @ value.double()
    starts = torch.tensor([0, 37], dtype=torch.int32)
    found_THE = _attend(kernel, (query, key, value), starts, False, 1.0)
    return float((found_THE.transpose(0, 1) - wanted_HTE).abs().max() / wanted_HTE.abs().max())
