"""The compiled attention kernel against attention in float64; the library it comes from."""

from __future__ import annotations

import logging
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nvembed.core.errors import ModelError
from nvembed.kernels import attention as native_attention
from nvembed.kernels import build as native_build
from nvembed.kernels.attention import supports_float32
from nvembed.kernels.build import read_cpu
from nvembed.model import attention
from nvembed.model.attention import flat_attention
from nvembed.model.packing import Segments
from oracles.attention import attend

try:
    native_build._compiler()
except native_build.NativeError as error:
    pytest.skip(str(error), allow_module_level=True)


def tensors(
    heads: int, key_heads: int, tokens: int, width: int, spread: float = 1.0
) -> list[Tensor]:
    """Queries, keys and values ``(H, T, E)`` that lie as a model's projections give them."""
    return [
        (torch.randn(tokens, count, width) * spread).transpose(0, 1).requires_grad_()
        for count in (heads, key_heads, key_heads)
    ]


def run(inputs: list[Tensor], lengths: list[int], scaling: float | None = None) -> Tensor:
    """Through the seam that the backbone uses; ``(T, H, E)``."""
    assert supports_float32(*inputs)
    out, _ = flat_attention(
        nn.Identity(),
        *(x_HTE[None] for x_HTE in inputs),
        None,
        segments=Segments.of_lengths(lengths),
        causal=False,
        scaling=scaling,
    )
    return out[0]


def assert_equals_oracle(
    inputs: list[Tensor], lengths: list[int], scaling: float, tolerance: float = 4e-6
) -> None:
    out = run(inputs, lengths, scaling)
    expected = attend(*inputs, lengths, scaling)
    d_out = torch.randn(out.shape)
    found = (out, *torch.autograd.grad(out, inputs, d_out))
    wanted = (expected, *torch.autograd.grad(expected, inputs, d_out.double()))
    for left, right in zip(found, wanted, strict=True):
        assert left.shape == right.shape
        # Gradients of queries and keys of one token are zero in exact arithmetic.
        allowed = tolerance * max(right.abs().max().item(), 1.0)
        assert (left.double() - right.double()).abs().max().item() < allowed


@pytest.mark.parametrize("width", [16, 32, 64, 80, 128])
def test_values_and_gradients(width: int) -> None:
    lengths = [130, 65, 64, 48, 33, 16, 15, 2, 1, 1]
    assert_equals_oracle(tensors(4, 2, sum(lengths), width), lengths, width**-0.5)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=6),
    key_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    width=st.sampled_from([16, 48]),
    spread=st.sampled_from([0.01, 1.0, 2.0]),
)
def test_any_segments_and_any_groups_of_heads(
    lengths: list[int], key_heads: int, group: int, width: int, spread: float
) -> None:
    inputs = tensors(key_heads * group, key_heads, sum(lengths), width, spread)
    assert_equals_oracle(inputs, lengths, 0.2, tolerance=3e-5)  # zeros by cancellation, too


def test_a_long_segment_and_scores_far_apart() -> None:
    """Blocks of other sizes; scores of a hundred, which float32 holds to 1e-5."""
    assert_equals_oracle(tensors(2, 1, 2600, 16, 4.0), [2100, 500], 0.25, tolerance=3e-5)


def test_other_memory_layouts() -> None:
    inputs = [x_HTE.detach().contiguous() for x_HTE in tensors(2, 1, 40, 16)]
    expected = run(inputs, [25, 15])
    gaps = [x_HTE.repeat_interleave(2, -1)[..., ::2] for x_HTE in inputs]
    assert torch.equal(run(gaps, [25, 15]), expected)
    joined = torch.cat([x_HTE.transpose(0, 1) for x_HTE in inputs], dim=1).transpose(0, 1)
    assert torch.equal(run([joined[:2], joined[2:3], joined[3:]], [25, 15]), expected)


def test_scores_that_overflow_a_power_of_two() -> None:
    query = torch.full((1, 3, 16), 40.0)
    key = torch.stack([torch.full((16,), value) for value in (40.0, -40.0, 39.0)])[None]
    value = torch.randn(1, 3, 16)
    assert torch.equal(run([query, key, value], [3]), value[0, :1].expand(3, 16)[:, None])


def test_what_is_no_number_is_not_hidden() -> None:
    inputs = [x_HTE.detach() for x_HTE in tensors(1, 1, 40, 16)]
    inputs[0][0, 3, 5] = float("nan")
    inputs[1][0, 30, 5] = float("inf")
    out = run(inputs, [20, 20])
    assert out[3].isnan().all()
    assert out[:20].isnan().all(-1).sum() == 1
    assert out[20:].isnan().any()


def test_the_same_bits_every_time_and_whatever_the_threads() -> None:
    lengths = [90, 40, 40, 7]
    inputs = tensors(4, 2, sum(lengths), 32)
    d_out = torch.randn(sum(lengths), 4, 32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 1, 3):
            torch.set_num_threads(count)
            out = run(inputs, lengths)
            results.append((out, *torch.autograd.grad(out, inputs, d_out)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_same_bits_without_gradient_and_computed_again() -> None:
    inputs = tensors(2, 2, 50, 16)
    d_out = torch.randn(50, 2, 16)
    kept = run(inputs, [30, 20])
    wanted = torch.autograd.grad(kept, inputs, d_out)
    with torch.inference_mode():
        assert torch.equal(run(inputs, [30, 20]), kept)
    again = checkpoint(lambda *given: run(list(given), [30, 20]), *inputs, use_reentrant=False)
    assert torch.equal(again, kept)
    found = torch.autograd.grad(again, inputs, d_out)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_no_scores_are_kept() -> None:
    saved: list[int] = []
    inputs = tensors(2, 2, 256, 16)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        run(inputs, [256])
    assert sum(saved) < 256 * 2 * (4 * 16 + 2)


def test_what_the_kernel_leaves_to_torch() -> None:
    query, key, value = (x_HTE.detach() for x_HTE in tensors(4, 2, 8, 16))
    assert supports_float32(query, key, value)
    assert not supports_float32(query.double(), key.double(), value.double())
    assert not supports_float32(query.bfloat16(), key.bfloat16(), value.bfloat16())
    assert not supports_float32(query[..., :8], key[..., :8], value[..., :8])
    assert not supports_float32(query[:3], key, value)
    assert not supports_float32(query.to("meta"), key.to("meta"), value.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not supports_float32(query, key, value)


def test_segments_that_leave_tokens_out_are_an_error() -> None:
    with pytest.raises(ValueError, match="segments cover 7 of 8 tokens"):
        run(tensors(2, 2, 8, 16), [4, 3])


@pytest.fixture(autouse=True, scope="module")
def _however_slow() -> Iterator[None]:
    """The kernel is tested where it is not faster, too."""
    native_attention._float32_kernel.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_attention, "this_cpu", lambda: read_cpu(["flags : avx512f"]))
        yield
    native_attention._float32_kernel.cache_clear()


@pytest.fixture
def _fresh() -> Iterator[None]:
    """Forget the library before and after."""
    for function in (native_build.library, native_attention._float32_kernel):
        function.cache_clear()
    yield
    for function in (native_build.library, native_attention._float32_kernel):
        function.cache_clear()


def attention_by_torch(caplog: pytest.LogCaptureFixture, level: int) -> str:
    """Check that attention works without the kernel; what was logged."""
    inputs = tensors(2, 1, 30, 16)
    with caplog.at_level(level, logger="nvembed"):
        assert not supports_float32(*inputs)
    out, _ = flat_attention(
        nn.Identity(),
        *(x_HTE[None] for x_HTE in inputs),
        None,
        segments=Segments.of_lengths([20, 10]),
        causal=False,
    )
    expected = attend(*inputs, [20, 10], 0.25)
    assert torch.allclose(out[0].double(), expected, atol=1e-6)
    return caplog.text


@pytest.mark.usefixtures("_fresh")
def test_no_compiler_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "there is no C++ compiler" in attention_by_torch(caplog, logging.INFO)


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("script", ["exit 1", "[ $1 = --version ]"], ids=["broken", "fails"])
def test_a_compiler_that_fails_is_no_error(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert f"{compiler} failed" in attention_by_torch(caplog, logging.INFO)


@pytest.mark.usefixtures("_fresh")
def test_a_cache_that_cannot_be_written_costs_a_compilation_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("NVEMBED_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    assert supports_float32(*tensors(2, 1, 30, 16))
    (library,) = (tmp_path / "temporary").glob("nvembed-*/native/*.so")
    assert stat.S_IMODE(library.parent.stat().st_mode) == 0o700


@pytest.mark.usefixtures("_fresh")
def test_a_kernel_that_computes_wrongly_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native_attention, "FLOAT32_TOLERANCE", 1e-9)
    assert "the compiled one is wrong by" in attention_by_torch(caplog, logging.WARNING)


@pytest.mark.usefixtures("_fresh")
def test_a_cpu_on_which_the_kernel_gains_nothing_leaves_attention_to_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native_attention, "this_cpu", lambda: read_cpu(["flags : avx avx2 fma"]))
    assert "no faster" in attention_by_torch(caplog, logging.INFO)


@pytest.mark.usefixtures("_fresh")
def test_no_clock_decides_on_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped() -> float:
        raise AssertionError("a clock was read")

    for clock in ("perf_counter", "monotonic", "thread_time_ns", "process_time"):
        monkeypatch.setattr(time, clock, stopped)
    assert native_attention._float32_kernel() is not None


def test_compiled_once_and_again_where_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "answer.cpp"
    source.write_text('extern "C" int answer() { return 42; }')
    monkeypatch.setenv("NVEMBED_CACHE", str(tmp_path / "cache"))
    assert native_build.load(source).answer() == 42
    (library,) = (tmp_path / "cache" / "native").glob("*.so")
    made = os.stat(library)
    assert native_build.load(source).answer() == 42
    assert os.stat(library).st_mtime_ns == made.st_mtime_ns
    source.write_text('extern "C" int answer() { return 43; }')
    assert native_build.load(source).answer() == 43
    (other,) = {*(tmp_path / "cache" / "native").glob("*.so")} - {library}
    other.unlink()  # a library in use must not be written over
    other.write_bytes(b"half")
    assert native_build.load(source).answer() == 43
    monkeypatch.setattr(native_build, "_compile", None)  # needed no more
    assert native_build.load(source).answer() == 43


def test_lengths_of_plain_products_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tensors(2, 1, 30, 16)
    expected = run(inputs, [20, 10])
    monkeypatch.setattr(attention, "SHORT_TOKENS_FLOAT32", 0)
    assert torch.equal(run(inputs, [20, 10]), expected)


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FC00001, 0x7FFFFFFF, -1, -0x7FFFFF])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_nan_with_a_payload_stays_one(which: int, bits: int) -> None:
    inputs = [x_HTE.detach() for x_HTE in tensors(1, 1, 40, 32)]
    inputs[which].view(torch.int32)[0, 3, 5] = bits
    leaves = [x_HTE.requires_grad_() for x_HTE in inputs]
    out_THE = run(leaves, [20, 20])
    seen = out_THE.isnan().any(-1)[:, 0].tolist()
    # Of a query its own token, of a key or value all that see it: those of its segment.
    assert seen == [row == 3 if which == 0 else row < 20 for row in range(40)]
    gradients = torch.autograd.grad(out_THE.sum(), leaves)
    assert all(d_HTE[0, :20].isnan().any() for d_HTE in gradients[: 2 if which == 2 else 3])
    assert all(d_HTE[0, 20:].isfinite().all() for d_HTE in gradients)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-40, -1e-45, 3.4e38, float("inf"), -float("inf")])
def test_a_lone_token_keeps_its_value(value: float) -> None:
    query, key, _ = tensors(1, 1, 2, 16)
    found = run([query, key, torch.full((1, 2, 16), value)], [1, 1])
    assert torch.equal(found, torch.full((2, 1, 16), value))


@pytest.mark.parametrize("scaling", [0.0, -0.5, float("nan"), float("inf")])
def test_a_scaling_that_is_not_above_zero_is_refused(scaling: float) -> None:
    for inputs in (tensors(2, 1, 8, 16), tensors(2, 1, 8, 20)):  # of the kernel, and of torch
        with pytest.raises(ModelError, match=f"scaled by {scaling}.*above 0"):
            flat_attention(
                nn.Identity(),
                *(x_HTE[None] for x_HTE in inputs),
                None,
                segments=Segments.of_lengths([8]),
                causal=False,
                scaling=scaling,
            )
    with pytest.raises(ModelError, match="above 0"):
        native_attention.float32_attention(*inputs, torch.tensor([0, 8]), scaling)
