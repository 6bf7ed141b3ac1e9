"""Norms, gates and rotary positions in one pass: as the modules that they stand in for."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from nvembed.kernels import build as native_build
from nvembed.kernels import functions as elementwise
from nvembed.kernels.functions import fits
from nvembed.kernels.layers import accelerate
from nvembed.kernels.trained import trained_gate, trained_norm
from nvembed.model.attention import FLAT_ATTENTION
from nvembed.model.packing import Segments

try:
    native_build._compiler()
except native_build.NativeError as error:
    pytest.skip(str(error), allow_module_level=True)


def mlp(activation: str = "silu") -> LlamaMLP:
    return LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=48, hidden_act=activation))


def norm() -> LlamaRMSNorm:
    made = LlamaRMSNorm(48, eps=1e-3)
    nn.init.normal_(made.weight)
    return made


def results(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients, of the input first."""
    x = x.clone().requires_grad_()
    out = module(x)
    torch.manual_seed(3)
    leaves = [x, *module.parameters()]
    return [out, *torch.autograd.grad(out, leaves, torch.randn(out.shape).to(out))]


@pytest.mark.parametrize("kind", [norm, mlp])
@pytest.mark.parametrize("shape", [(1, 7), (300,)])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 50.0])
def test_values_and_gradients(kind: Any, shape: tuple[int, ...], spread: float) -> None:
    module = kind()
    x = torch.randn(*shape, 48 if kind is norm else 32) * spread
    expected = results(copy.deepcopy(module).double(), x.double())
    counts = accelerate(module)
    assert counts["rms_norm"] + counts["gated_mlp"] == 1
    assert fits(x)
    names = [name for name, _ in module.named_parameters()]
    assert names == [name for name, _ in kind().named_parameters()]
    for got, want in zip(results(module, x), expected, strict=True):
        largest = want.abs().max().item()
        assert largest > 0
        assert (got.double() - want).abs().max().item() < 3e-6 * largest
    same = results(copy.deepcopy(module), x)
    assert all(torch.equal(a, b) for a, b in zip(results(module, x), same, strict=True))


@pytest.mark.parametrize("kind", [norm, mlp])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_nearer_to_float64_than_that_of_transformers(kind: Any, autocast: bool) -> None:
    module = kind().bfloat16()
    x = torch.randn(300, 48 if kind is norm else 32).bfloat16()
    exact = results(copy.deepcopy(module).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain = results(module, x)
        accelerate(module)
        found = results(module, x)
    assert not all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    for got, theirs, want in zip(found, plain, exact, strict=True):
        assert got.dtype == theirs.dtype == torch.bfloat16
        error, other = ((each.double() - want).norm() / want.norm() for each in (got, theirs))
        assert error < min(1.05 * other, 0.01)


def attention(hidden: int = 64, heads: int = 4) -> LlamaAttention:
    config = LlamaConfig(
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=2,
        head_dim=32,
        attn_implementation=FLAT_ATTENTION,
    )
    return LlamaAttention(config, 0)


def attended(module: nn.Module, x_TD: Tensor) -> list[Tensor]:
    """Output and gradients of attention over two texts."""
    angles_TE = (torch.arange(len(x_TD))[:, None] / 7) * torch.linspace(1, 0.1, 16).repeat(2)
    positions = tuple(x.to(x_TD.dtype)[None] for x in (angles_TE.cos(), angles_TE.sin()))
    options = {"segments": Segments.of_lengths([9, len(x_TD) - 9]), "causal": False}

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x_TD: Tensor) -> Tensor:
            out: Tensor = self.inner(x_TD[None], positions, None, **options)[0][0]
            return out

    return results(Called(), x_TD)


def test_attention_turns_heads_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    module = attention()
    x_TD = torch.randn(20, 64)
    exact = attended(copy.deepcopy(module).double(), x_TD.double())
    wide = attended(copy.deepcopy(module), x_TD)
    narrow = attended(copy.deepcopy(module).bfloat16(), x_TD.bfloat16())
    assert accelerate(module) == {"rotary_attention": 1, "linear": 4}
    called = []
    monkeypatch.setattr(elementwise, "call", called_by(called))
    for found, plain, bound in (
        (attended(module, x_TD), wide, 1e-5),
        (attended(module.bfloat16(), x_TD.bfloat16()), narrow, 0.03),
    ):
        for got, theirs, want in zip(found, plain, exact, strict=True):
            error, other = ((each.double() - want).norm() / want.norm() for each in (got, theirs))
            assert error < bound
            assert error < 1.2 * other + 1e-6
    rotations = ["rotate"] * 8
    assert [
        name for name in called if name == "rotate"
    ] == rotations  # queries and keys, there and back, in two types
    double = attended(module.double(), x_TD.double())
    for got, want in zip(double, exact, strict=True):  # what was rounded to bfloat16 above
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)
    assert called.count("rotate") == 8


def called_by(names: list[str]) -> Any:
    call = elementwise.call

    def counted(source: str, name: str, *arguments: Any) -> None:
        names.append(name)
        call(source, name, *arguments)

    return counted


def test_a_stock_call_of_attention_is_left_alone() -> None:
    module = attention()
    module.config._attn_implementation = "eager"
    plain = copy.deepcopy(module)
    accelerate(module)
    x_1TD = torch.randn(1, 6, 64)
    positions = (torch.ones(1, 6, 32), torch.zeros(1, 6, 32))
    mask = torch.zeros(1, 1, 6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), -1e9)
    assert torch.equal(module(x_1TD, positions, mask)[0], plain(x_1TD, positions, mask)[0])


def test_gates_far_from_zero_and_no_numbers() -> None:
    gate = torch.tensor([-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30, float("nan")] * 2)
    gate = gate.requires_grad_()
    up = torch.ones(16, requires_grad=True)
    out = trained_gate(gate, up)
    wanted = nn.functional.silu(gate) * up
    for got, want in zip(
        (out, *torch.autograd.grad(out.sum(), (gate, up))),
        (wanted, *torch.autograd.grad(wanted.sum(), (gate, up))),
        strict=True,
    ):
        torch.testing.assert_close(got[1:7], want[1:7], atol=1e-6, rtol=1e-6)
        assert got[7].isnan()


def test_only_what_computes_so_is_replaced() -> None:
    modules = nn.ModuleList([mlp("gelu"), GemmaRMSNorm(16), nn.RMSNorm(16)])
    assert set(accelerate(modules)) == {"linear"}


@pytest.mark.parametrize("kind", [norm, mlp])
def test_other_types_compute_as_before(kind: Any) -> None:
    module = kind()
    plain = copy.deepcopy(module)
    accelerate(module)
    x = torch.randn(5, 48 if kind is norm else 32)
    if kind is norm:  # of an MLP the products are bfloat16 there
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(module(x), plain(x))
    assert torch.equal(module.half()(x.half()), plain.half()(x.half()))
    assert torch.equal(module.double()(x.double()), plain.double()(x.double()))
    graph = torch.export.export(module.float(), (x,)).module()
    assert torch.equal(graph(x), plain.float()(x))


@pytest.fixture
def _fresh() -> Iterator[None]:
    """Forget the library before and after."""
    native_build.library.cache_clear()
    yield
    native_build.library.cache_clear()


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("kind", [norm, mlp])
def test_no_compiler_is_no_error(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = kind()
    plain = copy.deepcopy(module)
    accelerate(module)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    x = torch.randn(5, 48 if kind is norm else 32)
    assert all(
        torch.equal(a, b) for a, b in zip(results(module, x), results(plain, x), strict=True)
    )


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FC00001, 0x7FFFFFFF, -1, -0x7FFFFF])
def test_a_nan_with_a_payload_stays_one(bits: int) -> None:
    for which in (0, 1):
        inputs = [torch.ones(2, 16), torch.ones(2, 16)]
        inputs[which].view(torch.int32)[1, 4] = bits
        leaves = [x.requires_grad_() for x in inputs]
        out = trained_gate(*leaves)
        assert out.isnan().nonzero().tolist() == [[1, 4]]
        assert any(d.isnan().any() for d in torch.autograd.grad(out.sum(), leaves))
    x, weight = torch.ones(2, 16), torch.ones(16)
    x.view(torch.int32)[1, 4] = bits
    assert trained_norm(x, weight, 1e-6).isnan().any(-1).tolist() == [False, True]


def test_denormals_infinities_and_zeros_of_gates() -> None:
    up = torch.tensor([1e-40, -1e-45, 0.0, -0.0, torch.inf, -torch.inf, 3e38, -3e38] * 2)
    gate = torch.full((16,), 100.0)  # its sigmoid is 1
    assert torch.equal(trained_gate(gate, up), gate * up)
    assert torch.equal(trained_gate(gate, up).signbit(), up.signbit())
