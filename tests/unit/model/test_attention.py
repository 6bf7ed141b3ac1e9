"""Flat attention against plain attention over one segment after the other."""

from __future__ import annotations

import itertools
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nvembed.core.errors import ModelError
from nvembed.kernels import attention as kernels
from nvembed.model import attention
from nvembed.model.attention import block_attention, flat_attention, short_tokens
from nvembed.model.packing import Segments
from oracles.attention import attend

HEADS, KEY_HEADS, WIDTH = 4, 2, 8
# Runs of one and of several texts. Texts as long as there are heads, or key heads, so that no size
# can be taken for another one.
LENGTHS = [9, 6, 6, 4, 2, 2, 1]


def inputs(lengths: list[int], **options: Any) -> list[Tensor]:
    return [
        torch.randn(1, heads, sum(lengths), WIDTH, **options)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("short_tokens", [0, 6, 100])  # fused only, both, plain products only
@pytest.mark.parametrize(("scaling", "softcap"), [(None, None), (0.7, None), (0.7, 0.9)])
def test_values_and_gradients_equal_plain_attention(
    causal: bool,
    short_tokens: int,
    scaling: float | None,
    softcap: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "SHORT_TOKENS_FLOAT32", short_tokens)
    query, key, value = inputs(LENGTHS, requires_grad=True)
    got, weights = flat_attention(
        nn.Identity(),
        query,
        key,
        value,
        None,
        segments=Segments.of_lengths(LENGTHS),
        causal=causal,
        scaling=scaling,
        softcap=softcap,
    )
    expected = attend(
        query[0],
        key[0],
        value[0],
        LENGTHS,
        WIDTH**-0.5 if scaling is None else scaling,
        causal=causal,
        softcap=softcap,
    )[None]
    assert weights is None
    assert torch.allclose(got.double(), expected, atol=1e-6)
    weight = torch.randn(expected.shape)
    wanted = torch.autograd.grad((expected * weight).sum(), (query, key, value))
    found = torch.autograd.grad((got * weight).sum(), (query, key, value))
    for left, right in zip(found, wanted, strict=True):
        assert torch.allclose(left, right, atol=1e-5)


@pytest.mark.parametrize("lengths", [[5], [5, 5], [5, 3], [5, 5, 3], [2, 1, 1]])
def test_every_number_of_runs_is_joined_in_order(lengths: list[int]) -> None:
    query, key, value = inputs(lengths)
    segments = Segments.of_lengths(lengths)
    got, _ = flat_attention(nn.Identity(), query, key, value, None, segments=segments, causal=True)
    expected = attend(query[0], key[0], value[0], lengths, WIDTH**-0.5, causal=True)
    assert torch.allclose(got[0].double(), expected, atol=1e-6)


@pytest.mark.parametrize("short_tokens", [0, 100])
def test_dropout_drops_weights_and_keeps_the_mean(
    short_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SHORT_TOKENS_FLOAT32", short_tokens)
    segments = Segments.of_lengths([4] * 500)
    query = key = torch.zeros(1, HEADS, 2000, WIDTH)
    value = torch.ones(1, HEADS, 2000, WIDTH)
    out, _ = flat_attention(
        nn.Identity(), query, key, value, None, segments=segments, causal=False, dropout=0.2
    )
    # Of four weights of a quarter so many stay, each divided by 0.8.
    torch.testing.assert_close(out.unique(), torch.arange(5) * 0.25 / 0.8)
    assert out.mean().item() == pytest.approx(1.0, abs=0.01)


def test_padding_is_not_seen() -> None:
    query, key, value = (torch.randn(3, heads, 6, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    real = [6, 4, 1]
    seen_GL = torch.arange(6) < torch.tensor(real)[:, None]
    for causal in (False, True):
        out = block_attention(query, key, value, causal=causal, seen_GL=seen_GL)
        assert out.shape == query.shape
        for row, length in enumerate(real):
            parts = [x[row, :, :length] for x in (query, key, value)]
            expected = attend(*parts, [length], WIDTH**-0.5, causal=causal)
            found = out[row, :, :length].transpose(0, 1).double()
            assert torch.allclose(found, expected, atol=1e-6)


def test_under_autocast_the_weights_take_the_type_of_the_values() -> None:
    query, key, value = (
        torch.randn(2, heads, 5, WIDTH, dtype=torch.bfloat16)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    taken = []

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if func is torch.ops.aten.bmm.default:
                taken.append([x.dtype for x in args])
            return func(*args, **(kwargs or {}))

    with torch.autocast("cpu", torch.bfloat16), Watched():
        out = block_attention(query, key, value, causal=True)
    assert out.dtype is torch.bfloat16
    assert taken == [[torch.bfloat16] * 2] * 2


def test_a_block_stays_on_its_device() -> None:
    query, key, value = (
        torch.empty(2, heads, 5, WIDTH, device="meta") for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    out = block_attention(query, key, value, causal=True)
    assert (out.device.type, out.shape) == ("meta", query.shape)


class OnCuda(Tensor):
    """A tensor that says it lies on a GPU."""

    is_cuda = True


KERNELS = ("varlen", "native", "bfloat16", "grouped")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """The kernels that were called, with what they were given; each gives its own number."""
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def stub(name: str) -> Any:
        def kernel(*args: Any, **options: Any) -> Tensor:
            calls.append((name, args, options))
            return torch.full((2, 3, 4), float(KERNELS.index(name)))

        return kernel

    monkeypatch.setattr(attention, "_varlen", stub("varlen"))
    monkeypatch.setattr(kernels, "float32_attention", stub("native"))
    monkeypatch.setattr(kernels, "bfloat16_attention", stub("bfloat16"))
    monkeypatch.setattr(attention, "_grouped", stub("grouped"))
    return calls


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dropout", "softcap"), [(0.0, None), (0.1, None), (0.0, 5.0)])
def test_the_kernel_that_can_and_is_fastest_is_taken(
    taken: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    cuda: bool,
    dtype: torch.dtype,
    causal: bool,
    dropout: float,
    softcap: float | None,
) -> None:
    query, key, value = inputs([3, 2], dtype=dtype)
    if cuda:
        query, key, value = (x.as_subclass(OnCuda) for x in (query, key, value))
    segments = Segments.of_lengths([3, 2])

    def takes(answer: bool) -> Any:
        def asked(*tensors: Tensor) -> bool:
            for given, whole in zip(tensors, (query, key, value), strict=True):
                assert torch.equal(given, whole[0])
            return answer

        return asked

    plain = not dropout and softcap is None
    for float32_takes, bfloat16_takes in itertools.product((False, True), repeat=2):
        monkeypatch.setattr(kernels, "supports_float32", takes(float32_takes))
        monkeypatch.setattr(kernels, "supports_bfloat16", takes(bfloat16_takes))
        if cuda and dtype is not torch.float32 and plain:
            expected = "varlen"
        elif plain and not causal and float32_takes:
            expected = "native"
        elif plain and bfloat16_takes:
            expected = "bfloat16"
        else:
            expected = "grouped"
        taken.clear()
        out, _ = flat_attention(
            nn.Identity().eval(),
            query,
            key,
            value,
            None,
            segments=segments,
            causal=causal,
            scaling=0.3,
            dropout=dropout,
            softcap=softcap,
        )
        ((name, args, options),) = taken
        assert name == expected
        assert torch.equal(out, torch.full((1, 2, 3, 4), float(KERNELS.index(name))))
        for given, whole in zip(args[:3], (query, key, value), strict=True):
            assert torch.equal(given, whole[0])
        assert (args[3:], options) == {
            "varlen": ((segments, causal, 0.3), {}),
            "native": ((segments.cu_seqlens, 0.3), {}),
            "bfloat16": ((segments.cu_seqlens,), {"causal": causal, "scaling": 0.3}),
            "grouped": ((segments, causal, 0.3, dropout, softcap), {}),
        }[name]


def test_without_dropout_given_there_is_none(taken: list[Any]) -> None:
    query, key, value = inputs([2])
    segments = Segments.of_lengths([2])
    flat_attention(nn.Identity(), query, key, value, None, segments=segments, causal=True)
    assert taken[0][1][3:] == (segments, True, None, 0.0, None)


@pytest.mark.parametrize(
    ("dtype", "length", "softcap", "device", "products"),
    [
        (torch.float32, 128, None, "cpu", True),
        (torch.float32, 129, None, "cpu", False),
        (torch.bfloat16, 1024, None, "cpu", True),
        (torch.bfloat16, 1025, None, "cpu", False),
        (torch.float16, 1024, None, "cpu", True),
        (torch.float16, 1025, None, "cpu", False),
        (torch.float32, 129, 5.0, "cpu", True),
        (torch.float32, 2, None, "meta", False),
        (torch.float32, 2, 5.0, "meta", True),
    ],
)
def test_short_texts_on_a_cpu_and_soft_caps_are_plain_products(
    dtype: torch.dtype,
    length: int,
    softcap: float | None,
    device: str,
    products: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called = []

    def stub(name: str) -> Any:
        def kernel(query: Tensor, *args: Any, **options: Any) -> Tensor:
            called.append(name)
            # As it lies in memory once the segments are end to end.
            return torch.zeros_like(query.transpose(1, 2).contiguous()).transpose(1, 2)

        return kernel

    monkeypatch.setattr(attention, "block_attention", stub("products"))
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", stub("fused"))
    tensors = (torch.zeros(1, 1, length, WIDTH, dtype=dtype, device=device) for _ in range(3))
    out, _ = flat_attention(
        nn.Identity().eval(),
        *tensors,
        None,
        segments=Segments.of_lengths([length]),
        causal=True,
        softcap=softcap,
    )
    assert called == ["products" if products else "fused"]
    assert out.shape == (1, length, 1, WIDTH)


def test_a_single_run_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    made = torch.randn(2, 3, HEADS, WIDTH)  # two texts of three tokens, end to end
    monkeypatch.setattr(attention, "block_attention", lambda *_, **__: made.transpose(1, 2))
    query, key, value = inputs([3, 3])
    segments = Segments.of_lengths([3, 3])
    out, _ = flat_attention(nn.Identity(), query, key, value, None, segments=segments, causal=True)
    assert torch.equal(out[0], made.flatten(0, 1))
    assert out.data_ptr() == made.data_ptr()


@pytest.mark.parametrize("compiled", [False, True])
def test_longest_text_whose_scores_are_held(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "float32_available", lambda: compiled)
    assert short_tokens(torch.float32) == (0 if compiled else 128)
    assert short_tokens(torch.bfloat16) == 1024
    assert short_tokens(torch.float16) == 1024
    assert short_tokens(torch.float64) == 128


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("key_heads", [HEADS, KEY_HEADS])
@pytest.mark.parametrize("announced", [False, True])
def test_the_cuda_kernel_is_given_the_segments_and_the_direction(
    causal: bool, key_heads: int, announced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-ins with the meaning of ``varlen_attn``, where there is no GPU."""

    def of_torch_2_11(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        assert window_size in ((-1, -1), (-1, 0))
        assert cu_seq_q.dtype is torch.int32
        assert torch.equal(cu_seq_q, cu_seq_k)
        lengths = cu_seq_q.diff().tolist()
        assert max_q == max_k == max(lengths)
        parts = (x.transpose(0, 1) for x in (query, key, value))
        scaling = WIDTH**-0.5 if scale is None else scale
        return attend(*parts, lengths, scaling, causal=window_size == (-1, 0))

    def of_torch_2_12(*args: Any, enable_gqa: bool = False, **options: Any) -> Tensor:
        assert enable_gqa is (args[0].shape[1] != args[1].shape[1])
        return of_torch_2_11(*args, **options)

    install_varlen(monkeypatch, of_torch_2_12 if announced else of_torch_2_11)
    shapes = [(1, heads, sum(LENGTHS), WIDTH) for heads in (HEADS, key_heads, key_heads)]
    query, key, value = (torch.randn(shape, dtype=torch.bfloat16) for shape in shapes)
    for scaling in (None, 0.3):
        out, _ = flat_attention(
            nn.Identity(),
            *(x.as_subclass(OnCuda) for x in (query, key, value)),
            None,
            segments=Segments.of_lengths(LENGTHS),
            causal=causal,
            scaling=scaling,
        )
        wanted = WIDTH**-0.5 if scaling is None else scaling
        expected = attend(query[0], key[0], value[0], LENGTHS, wanted, causal=causal)
        assert torch.equal(out[0], expected)


def install_varlen(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    module = ModuleType("torch.nn.attention.varlen")
    module.varlen_attn = function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize(
    ("width", "expected"), [(8, "varlen"), (256, "varlen"), (20, "grouped"), (264, "grouped")]
)
def test_head_widths_that_flash_attention_lacks_go_another_way(
    taken: list[Any], width: int, expected: str
) -> None:
    query = torch.randn(1, HEADS, 2, width, dtype=torch.bfloat16).as_subclass(OnCuda)
    segments = Segments.of_lengths([2])
    flat_attention(nn.Identity(), query, query, query, None, segments=segments, causal=False)
    assert taken[0][0] == expected


def test_under_autocast_a_gpu_attends_in_its_type(taken: list[Any]) -> None:
    """Queries and keys are float32 there, where the residual is: rotary angles are of its type."""
    query, key, value = (x.as_subclass(OnCuda) for x in inputs(LENGTHS))
    value = value.bfloat16()
    segments = Segments.of_lengths(LENGTHS)
    arguments = (nn.Identity(), query, key, value, None)
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        flat_attention(*arguments, segments=segments, causal=False)
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", torch.float16)
    ((name, args, _),) = taken
    assert name == "varlen"
    for given, whole in zip(args[:3], (query, key, value), strict=True):
        assert given.dtype is torch.bfloat16
        assert torch.equal(given, whole[0].bfloat16())


@pytest.mark.parametrize("name", ["s_aux", "position_bias", "sinks", "attention_mask"])
def test_what_would_silently_be_left_out_is_refused(name: str) -> None:
    query, key, value = inputs([2])
    others: dict[str, Any] = {"s_aux": None, "position_bias": None, "sinks": None}
    mask = None
    options = {"segments": Segments.of_lengths([2]), "causal": False}
    flat_attention(nn.Identity(), query, key, value, None, **options, **others)  # None is nothing
    if name == "attention_mask":
        mask = torch.ones(1)
    else:
        others[name] = torch.ones(1)
    with pytest.raises(ModelError) as found:
        flat_attention(nn.Identity(), query, key, value, mask, **options, **others)
    assert str(found.value) == (
        f"Identity needs {name} in attention; expected a backbone whose attention is a plain "
        "softmax over keys. Choose another backbone (Mistral, Llama, Qwen, Gemma, Phi, BERT and "
        "ModernBERT work)"
    )


def test_all_that_is_refused_is_named_at_once() -> None:
    query, key, value = inputs([2])
    with pytest.raises(ModelError, match="needs s_aux, sinks, attention_mask in attention"):
        flat_attention(
            nn.Identity(),
            query,
            key,
            value,
            torch.ones(1),
            segments=Segments.of_lengths([2]),
            causal=False,
            sinks=torch.ones(1),
            s_aux=torch.ones(1),
        )


@pytest.mark.parametrize("scaling", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("causal", [False, True])
def test_a_scaling_that_is_not_above_zero_is_refused(scaling: float, causal: bool) -> None:
    query, key, value = inputs([3])
    segments = Segments.of_lengths([3])
    with pytest.raises(ModelError, match=f"scaled by {scaling}.*a factor above 0"):
        flat_attention(
            nn.Identity(),
            query,
            key,
            value,
            None,
            segments=segments,
            causal=causal,
            scaling=scaling,
        )
