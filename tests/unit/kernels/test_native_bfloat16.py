"""The compiled bfloat16 kernel against attention in float64, through the seam that models use."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nvembed.core.errors import ModelError
from nvembed.kernels.attention import (
    bfloat16_attention,
    bfloat16_available,
    supports_bfloat16,
)
from nvembed.model.attention import flat_attention
from nvembed.model.packing import Segments
from oracles.attention import attend

if not bfloat16_available():
    pytest.skip("no compiled kernel for bfloat16 on this machine", allow_module_level=True)


def tensors(heads: int, key_heads: int, tokens: int, width: int) -> list[Tensor]:
    """Queries, keys and values ``(H, T, E)`` that lie as a model's projections give them."""
    return [
        torch.randn(tokens, count, width).bfloat16().transpose(0, 1)
        for count in (heads, key_heads, key_heads)
    ]


def run(inputs: list[Tensor], lengths: list[int], causal: bool, scaling: float) -> Tensor:
    with torch.inference_mode():
        assert supports_bfloat16(*inputs)
        out, _ = flat_attention(
            nn.Identity().eval(),  # in training scores are made again on the way back
            *(x_HTE[None] for x_HTE in inputs),
            None,
            segments=Segments.of_lengths(lengths),
            causal=causal,
            scaling=scaling,
        )
    assert out.dtype is torch.bfloat16
    return out[0]


def expected(inputs: list[Tensor], lengths: list[int], causal: bool, scaling: float) -> Tensor:
    """In float64; a token that sees what came before it is the last of a text of its own."""
    if not causal:
        return attend(*inputs, lengths, scaling)
    rows, start = [], 0
    for length in lengths:
        for end in range(start + 1, start + length + 1):
            seen = [x_HTE[:, start:end] for x_HTE in inputs]
            rows.append(attend(*seen, [end - start], scaling)[-1])
        start += length
    return torch.stack(rows)


def assert_equals_oracle(
    inputs: list[Tensor], lengths: list[int], causal: bool, scaling: float
) -> None:
    found = run(inputs, lengths, causal, scaling).double()
    wanted = expected(inputs, lengths, causal, scaling)
    assert found.shape == wanted.shape
    # Rounded twice: weights, of which many sum up, and the result.
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 2**-7
    assert float((found - wanted).norm() / wanted.norm()) < 2**-8


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("width", [32, 64, 96, 128])
def test_values(width: int, causal: bool) -> None:
    lengths = [130, 65, 64, 49, 48, 33, 16, 15, 2, 1, 1]
    assert_equals_oracle(tensors(4, 2, sum(lengths), width), lengths, causal, width**-0.5)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=6),
    key_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    causal=st.booleans(),
)
def test_any_segments_and_any_groups_of_heads(
    lengths: list[int], key_heads: int, group: int, causal: bool
) -> None:
    inputs = tensors(key_heads * group, key_heads, sum(lengths), 32)
    assert_equals_oracle(inputs, lengths, causal, 0.2)


def test_other_memory_layouts() -> None:
    inputs = [x_HTE.contiguous() for x_HTE in tensors(2, 1, 40, 32)]
    wanted = run(inputs, [25, 15], False, 0.2)
    gaps = [x_HTE.repeat_interleave(2, -1)[..., ::2] for x_HTE in inputs]
    assert torch.equal(run(gaps, [25, 15], False, 0.2), wanted)
    joined = torch.cat([x_HTE.transpose(0, 1) for x_HTE in inputs], dim=1).transpose(0, 1)
    parts = [joined[:2], joined[2:3], joined[3:]]
    assert torch.equal(run(parts, [25, 15], False, 0.2), wanted)


def test_what_is_no_number_is_not_hidden() -> None:
    inputs = tensors(1, 1, 40, 32)
    inputs[0][0, 3, 5] = float("nan")
    out = run(inputs, [20, 20], False, 0.2)
    assert out[3].isnan().all()
    assert out.isnan().any(-1).sum() == 1


def test_the_same_bits_whatever_the_threads() -> None:
    inputs = tensors(4, 2, 300, 64)
    wanted = run(inputs, [200, 60, 40], True, 0.1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert torch.equal(run(inputs, [200, 60, 40], True, 0.1), wanted)
    finally:
        torch.set_num_threads(threads)


def test_what_it_does_not_take() -> None:
    query, key, value = tensors(2, 1, 8, 32)
    assert not supports_bfloat16(query.float(), key.float(), value.float())
    assert not supports_bfloat16(*tensors(2, 1, 8, 16))
    assert not supports_bfloat16(query.clone().requires_grad_(), key, value)
    assert not supports_bfloat16(*tensors(3, 2, 8, 32))
    with pytest.raises(ValueError, match="segments cover 7 of 8 tokens"):
        bfloat16_attention(query, key, value, torch.tensor([0, 7]), causal=False)


@pytest.mark.parametrize("scaling", [0.0, -0.5, float("nan"), float("inf")])
def test_a_scaling_that_is_not_above_zero_is_refused(scaling: float) -> None:
    with pytest.raises(ModelError, match="above 0"):
        run(tensors(2, 1, 8, 32), [8], False, scaling)


@pytest.mark.parametrize("bits", [0x7F81, 0x7FC1, 0x7FFF, -1, -0x7F])
def test_a_nan_with_a_payload_stays_one(bits: int) -> None:
    for which in (0, 1, 2):
        inputs = tensors(1, 1, 40, 32)
        inputs[which].view(torch.int16)[0, 3, 5] = bits
        seen = run(inputs, [20, 20], False, 0.2).isnan().any(-1)[:, 0].tolist()
        assert seen == [row == 3 if which == 0 else row < 20 for row in range(40)]


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-40, -1e-40, 3e38, float("inf"), -float("inf")])
def test_a_lone_token_keeps_its_value(value: float) -> None:
    query, key, _ = tensors(1, 1, 2, 32)
    value_KTE = torch.full((1, 2, 32), value, dtype=torch.bfloat16)
    found = run([query, key, value_KTE], [1, 1], False, 0.2).double()
    # Products of AVX512-BF16 take what is below 2**-126 for 0.
    wanted = 0.0 if abs(value) < 2**-126 else value_KTE[0, 0, 0].double().item()
    assert torch.equal(found, torch.full((2, 1, 32), wanted, dtype=torch.float64))
