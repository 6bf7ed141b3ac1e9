"""Attention one segment and one head at a time, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def attend(
    query_HTE: Tensor,
    key_KTE: Tensor,
    value_KTE: Tensor,
    lengths: Sequence[int],
    scaling: float,
    *,
    causal: bool = False,
    softcap: float | None = None,
) -> Tensor:
    """Softmax attention within each segment, in both directions or to what came before only.

    Returns ``(T, H, E)``, differentiable.
    """
    group = len(query_HTE) // len(key_KTE)
    rows = []
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        heads = []
        for head, query_TE in enumerate(query_HTE):
            q, k, v = (
                x_TE[part].double()
                for x_TE in (query_TE, key_KTE[head // group], value_KTE[head // group])
            )
            score = q @ k.T * scaling
            if softcap is not None:
                score = softcap * (score / softcap).tanh()
            if causal:
                score = score + torch.full_like(score, float("-inf")).triu(1)
            heads.append(score.softmax(-1) @ v)
        rows.append(torch.stack(heads, dim=1))
        start += length
    return torch.cat(rows)
