"""Flat attention against plain attention over one segment after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nvembed.model import attention
from nvembed.model.attention import flat_attention
from nvembed.text.packing import Segments

HEADS, KEY_HEADS, WIDTH = 4, 2, 8


def plain(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], causal: bool) -> Tensor:
    """Softmax attention in float64, a segment and a head at a time; ``(1, T, H, E)``."""
    rows = []
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        heads = []
        for head in range(HEADS):
            q = query[0, head, part].double()
            k, v = (x[0, head * KEY_HEADS // HEADS, part].double() for x in (key, value))
            score = q @ k.T / WIDTH**0.5
            if causal:
                score = score + torch.full_like(score, float("-inf")).triu(1)
            heads.append(score.softmax(-1) @ v)
        rows.append(torch.stack(heads, dim=1))
        start += length
    return torch.cat(rows)[None]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("short_tokens", [0, 6, 100])  # fused only, both, plain products only
def test_values_and_gradients_equal_plain_attention(
    causal: bool, short_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SHORT_TOKENS_FLOAT32", short_tokens)
    lengths = [9, 6, 6, 1]
    shapes = [(1, heads, sum(lengths), WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    query, key, value = (torch.randn(shape, requires_grad=True) for shape in shapes)
    segments = Segments.of_lengths(lengths)
    got, _ = flat_attention(
        nn.Identity(), query, key, value, None, segments=segments, causal=causal
    )
    expected = plain(query, key, value, lengths, causal)
    assert torch.allclose(got.double(), expected, atol=1e-6)
    weight = torch.randn(expected.shape)
    wanted = torch.autograd.grad((expected * weight).sum(), (query, key, value))
    found = torch.autograd.grad((got * weight).sum(), (query, key, value))
    for left, right in zip(found, wanted, strict=True):
        assert torch.allclose(left, right, atol=1e-5)


def test_dropout_drops_weights_and_keeps_the_mean() -> None:
    segments = Segments.of_lengths([4] * 500)
    query = key = torch.zeros(1, HEADS, 2000, WIDTH)
    value = torch.ones(1, HEADS, 2000, WIDTH)
    out, _ = flat_attention(
        nn.Identity(), query, key, value, None, segments=segments, causal=False, dropout=0.5
    )
    assert set(out.unique().tolist()) == {0.0, 0.5, 1.0, 1.5, 2.0}
    assert out.mean().item() == pytest.approx(1.0, abs=0.02)
