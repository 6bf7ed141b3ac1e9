"""Attention over the segments of a flat batch, behind transformers' ``AttentionInterface``.

Every backbone runs with ``attn_implementation="nvembed_flat"``. transformers then builds no mask at
all and hands queries, keys and values of the whole pack to :func:`flat_attention`, which lets a
token see its own segment only: all of it (bidirectional) or what came before (causal). Sliding
windows are ignored on
    purpose:
an embedding needs the whole text (NV-Embed never applies Mistral's, nv-embed.md 1.2).

Two kernels: ``varlen_attn`` on CUDA in 16 bit, grouped SDPA elsewhere (segments of equal length
    stand side
by side and form one dense call; nothing is padded).

Letters: T tokens of the pack, H heads, E head width, G segments of one group, L their length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from nvembed.core.errors import ModelError
from nvembed.text.packing import Segments

FLAT_ATTENTION = "nvembed_flat"

OTHER_BACKBONE = (
    "Choose another backbone (Mistral, Llama, Qwen, Gemma, Phi, BERT and ModernBERT work)"
)

# Arguments that change what attention computes and that this backend does not implement.
_UNSUPPORTED = ("s_aux", "position_bias", "sinks")


def flat_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments,
    causal: bool,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls in every layer.

    Shapes: query ``(1, H, T, E)``, key and value ``(1, H or fewer, T, E)``; returns ``(1, T, H,
        E)``.

    Raises:
        ModelError: the backbone asks for something that would silently be left out (attention
            sinks, position biases, a mask of its own).
    """
    asked = [name for name in _UNSUPPORTED if others.get(name) is not None]
    if attention_mask is not None:
        asked.append("attention_mask")
    if asked:
        raise ModelError(
            f"{type(module).__name__} needs {', '.join(asked)} in attention",
            expected="a backbone whose attention is a plain softmax over keys",
            hint=OTHER_BACKBONE,
        )
    if (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and not (softcap or dropout)
    ):
        out_THE = _varlen(query[0], key[0], value[0], segments, causal, scaling)
    else:
        out_THE = _grouped(query[0], key[0], value[0], segments, causal, scaling, dropout, softcap)
    return out_THE[None], None


AttentionInterface.register(FLAT_ATTENTION, flat_attention)


def _varlen(
    query_HTE: Tensor,
    key_HTE: Tensor,
    value_HTE: Tensor,
    segments: Segments,
    causal: bool,
    scaling: float | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # absent from CPU-only builds of torch

    grouped = key_HTE.shape[0] != query_HTE.shape[0]
    out = varlen_attn(
        query_HTE.transpose(0, 1).contiguous(),
        key_HTE.transpose(0, 1).contiguous(),
        value_HTE.transpose(0, 1).contiguous(),
        segments.cu_seqlens,
        segments.cu_seqlens,
        segments.max_length,
        segments.max_length,
        scale=scaling,
        window_size=(-1, 0) if causal else (-1, -1),
        enable_gqa=grouped,
    )
    assert isinstance(out, Tensor)
    return out


def _grouped(
    query_HTE: Tensor,
    key_HTE: Tensor,
    value_HTE: Tensor,
    segments: Segments,
    causal: bool,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
) -> Tensor:
    repeats = query_HTE.shape[0] // key_HTE.shape[0]
    if repeats > 1:
        key_HTE = key_HTE.repeat_interleave(repeats, dim=0)
        value_HTE = value_HTE.repeat_interleave(repeats, dim=0)
    runs = segments.runs()
    # One split and not a slice per run: the gradient of a split is one concatenation, that of a
    # slice fills the whole pack with zeros, once for every run.
    sizes = [count * length for _, count, length in runs]
    outputs = []
    for (_, count, length), *parts in zip(
        runs, *(x_HTE.split(sizes, dim=1) for x_HTE in (query_HTE, key_HTE, value_HTE)), strict=True
    ):
        q, k, v = (x_HTE.unflatten(1, (count, length)).transpose(0, 1) for x_HTE in parts)
        if softcap:
            out_GHLE = _capped(q, k, v, causal, scaling, dropout, softcap)
        else:
            out_GHLE = nn.functional.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, is_causal=causal, scale=scaling
            )
        outputs.append(out_GHLE.transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _capped(
    query_GHLE: Tensor,
    key_GHLE: Tensor,
    value_GHLE: Tensor,
    causal: bool,
    scaling: float | None,
    dropout: float,
    softcap: float,
) -> Tensor:
    """Attention with Gemma 2's ``cap * tanh(score / cap)``, which SDPA does not offer."""
    scale = scaling if scaling is not None else query_GHLE.shape[-1] ** -0.5
    score_GHLL = query_GHLE @ key_GHLE.transpose(-1, -2) * scale
    score_GHLL = softcap * torch.tanh(score_GHLL / softcap)
    if causal:
        later_LL = torch.ones(score_GHLL.shape[-2:], dtype=torch.bool, device=score_GHLL.device)
        score_GHLL = score_GHLL.masked_fill(later_LL.triu(1), float("-inf"))
    weight_GHLL = score_GHLL.float().softmax(-1).to(query_GHLE.dtype)
    return nn.functional.dropout(weight_GHLL, dropout) @ value_GHLE
