from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, LlamaConfig, MistralConfig, Qwen2Config

from nvembed.core.errors import ModelError
from nvembed.kernels import functions as elementwise
from nvembed.kernels import layers as native_layer
from nvembed.kernels.functions import gated as gated_by
from nvembed.kernels.functions import rotate
from nvembed.kernels.layers import accelerate
from nvembed.model.attention import FLAT_ATTENTION
from nvembed.model.packing import Segments

LENGTHS = (17, 9, 9, 1)
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}

if not native_layer.available():
    pytest.skip("no compiled kernels on this machine", allow_module_level=True)


@pytest.fixture(autouse=True)
def _layers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms, MLPs and linear layers have tests of their own."""
    kinds = native_layer.KINDS
    layers = {name: kind for name, kind in kinds.items() if name.endswith("DecoderLayer")}
    monkeypatch.setattr(native_layer, "KINDS", layers)


@pytest.fixture(params=["mistral", "llama", "qwen2"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    config: Any = {
        "mistral": lambda: MistralConfig(**SIZES, head_dim=32),
        "llama": lambda: LlamaConfig(**SIZES, head_dim=32),
        "qwen2": lambda: Qwen2Config(**{**SIZES, "num_attention_heads": 2}),
    }[request.param]()
    made = AutoModel.from_config(config, attn_implementation=FLAT_ATTENTION).eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "norm" in name or "bias" in name:
                weight.add_(torch.randn_like(weight) / 4)
            else:
                weight.mul_(5)
    return made


def _hidden(model: nn.Module, *, causal: bool = False) -> Tensor:
    ids = torch.arange(sum(LENGTHS)) * 7 % 50
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    output: Any = model(
        input_ids=ids[None],
        position_ids=positions[None],
        attention_mask=None,
        segments=Segments.of_lengths(LENGTHS),
        causal=causal,
        use_cache=False,
    )
    return output.last_hidden_state[0].detach()  # type: ignore[no-any-return]


def _calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    called: list[str] = []
    call = elementwise.call

    def counted(source: str, name: str, *arguments: Any) -> None:
        called.append(name)
        call(source, name, *arguments)

    for module in (elementwise, native_layer):
        monkeypatch.setattr(module, "call", counted)
    return called


@pytest.mark.parametrize("causal", [False, True])
def test_float32_layers_give_what_float64_ones_of_transformers_give(
    model: nn.Module, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = _calls(monkeypatch)
    wanted = _hidden(model.double(), causal=causal)
    assert accelerate(model.float()) == {"decoder_layer": 3}
    with torch.inference_mode():
        found = _hidden(model, causal=causal)
    assert len(called) == 3 * 6  # two norms, two rotations, a gate and a sum per layer
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5


def test_a_mask_is_not_left_out_in_silence(model: nn.Module) -> None:
    accelerate(model)
    options: Any = {"segments": Segments.of_lengths([3]), "causal": False}
    angles = (torch.ones(1, 3, 32), torch.zeros(1, 3, 32))
    x_1TD = torch.randn(1, 3, 64)
    with torch.inference_mode(), pytest.raises(ModelError, match="attention_mask"):
        model.layers[0](
            x_1TD, position_embeddings=angles, attention_mask=torch.zeros(1, 1, 3, 3), **options
        )


def test_bfloat16_layers_are_nearer_to_float64_than_those_of_transformers(model: nn.Module) -> None:
    model = model.bfloat16()
    with torch.inference_mode():
        plain = _hidden(model).double()
        wanted = _hidden(model.double())
        accelerate(model.bfloat16())
        found = _hidden(model)
    assert found.dtype == torch.float32  # the sum through the layers
    errors = [float((x.double() - wanted).norm() / wanted.norm()) for x in (found, plain)]
    assert errors[0] < 0.8 * errors[1]
    assert errors[0] < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_parts_are_those_of_plain_float64(dtype: torch.dtype) -> None:
    bound = 1e-6 if dtype is torch.float32 else 2**-8
    residual = torch.randn(5, 64)
    added, gate, up = (torch.randn(5, 64).to(dtype) for _ in range(3))
    norm: Any = nn.Module()
    norm.weight, norm.variance_epsilon = nn.Parameter(torch.randn(64).to(dtype)), 1e-5
    total = residual.double() + added.double()
    wanted = norm.weight.double() * total / (total.pow(2).mean(1, keepdim=True) + 1e-5).sqrt()
    with torch.no_grad():
        normed = native_layer._add_norm(residual, added, norm, dtype)
        gated = gated_by(gate, up)
    torch.testing.assert_close(residual.double(), total, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(normed.double(), wanted.detach(), rtol=bound, atol=bound / 100)
    wanted = nn.functional.silu(gate.double()) * up.double()
    torch.testing.assert_close(gated.double(), wanted, rtol=2 * bound, atol=bound / 100)
    angle = torch.rand(5, 16).double()
    positions: Any = tuple(x.repeat(1, 2)[None].to(dtype) for x in (angle.cos(), angle.sin()))
    x = torch.randn(5, 2, 32).to(dtype)
    turned = torch.view_as_complex(x.double().unflatten(2, (2, 16)).transpose(2, 3).contiguous())
    turned = turned * torch.complex(*(x[0, :, :16].double() for x in positions))[:, None]
    wanted = torch.cat([turned.real, turned.imag], dim=2)
    for inner in {torch.float32, dtype}:
        found = rotate(x.flatten(1), *(angles[0] for angles in positions), 32, inner)
        bound = 1e-5 if inner is torch.float32 else 2**-8
        torch.testing.assert_close(found.double(), wanted, rtol=bound, atol=1e-5)
    assert native_layer._add(residual, added) is residual
    torch.testing.assert_close(residual.double(), total + added.double(), rtol=1e-6, atol=1e-6)


def test_bfloat16_is_rounded_as_torch_rounds_it() -> None:
    bits = torch.randint(0, 2**16, (64, 64), dtype=torch.int32) << 16
    gate = (bits | torch.randint(0, 2**16, (64, 64), dtype=torch.int32)).view(torch.float32)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 3.4e38, 1e-30] + [1.0] * 10)
    residual = torch.cat([gate.clamp(-1e4, 1e4).nan_to_num(), odd.repeat(64, 4)[:, :64]], dim=0)
    norm: Any = nn.Module()
    norm.weight, norm.variance_epsilon = torch.ones(64), 1e-5
    wide = native_layer._add_norm(residual.clone(), None, norm, torch.float32)
    narrow = native_layer._add_norm(residual.clone(), None, norm, torch.bfloat16)
    assert torch.equal(narrow.isnan(), wide.isnan())
    assert torch.equal(narrow.nan_to_num(), wide.bfloat16().nan_to_num())


def test_with_gradients_and_without_the_library_layers_compute_as_they_did(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = _hidden(model)
    accelerate(model)
    called = _calls(monkeypatch)
    assert torch.equal(_hidden(model), wanted)
    monkeypatch.setattr(native_layer, "available", lambda: False)
    with torch.no_grad():
        assert torch.allclose(_hidden(model), wanted, atol=1e-5)
    assert not called


# Payloads, quiet and signalling; infinities; denormals; zeros; ties, and what rounds to infinity.
SPECIAL_BITS = (
    *(0x7F800001, 0x7FC00001, 0x7FFFFFFF, 0x7F80FFFF, 0x7F7FFFFF + 0x12345, -1, -0x7FFFFF),
    *(0x7F800000, -0x800000, 0x00000001, 0x00007FFF, 0x00008000, 0x007FFFFF, -0x7FFFFFFF),
    *(0, -0x80000000, 0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F7F7FFF, 0x7F7F8000),
)


def test_what_is_special_is_rounded_to_bfloat16_as_torch_does() -> None:
    special = torch.tensor([*SPECIAL_BITS, *[0x3F800000] * 10], dtype=torch.int32)
    assert len(special) == 32
    norm = nn.RMSNorm(32)
    norm.variance_epsilon = 0.0  # type: ignore[assignment]
    norm.weight = nn.Parameter(special.view(torch.float32))
    # Every row has a mean square of 1, so what comes out is the weight.
    found = native_layer._add_norm(torch.ones(3, 32), None, norm, torch.bfloat16)
    wanted = norm.weight.detach().bfloat16().expand(3, 32)
    assert_same_numbers(found, wanted)
    wide = native_layer._add_norm(torch.ones(3, 32), None, norm, torch.float32)
    assert_same_numbers(wide, norm.weight.detach().expand(3, 32))


def assert_same_numbers(found: Tensor, wanted: Tensor) -> None:
    bits = torch.int16 if found.dtype is torch.bfloat16 else torch.int32
    assert torch.equal(found.isnan(), wanted.isnan())
    number = ~wanted.isnan()
    assert torch.equal(found.view(bits)[number], wanted.contiguous().view(bits)[number])


def test_every_bfloat16_is_widened_exactly() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    found = native_layer._add(torch.zeros(1, 2**16), every[None])
    assert_same_numbers(found[0], torch.zeros(2**16) + every.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_and_rotations_hide_no_nan(dtype: torch.dtype) -> None:
    special = torch.tensor(SPECIAL_BITS + (0,) * 10, dtype=torch.int32).view(torch.float32)
    bits = special.view(torch.int16)[1::2].view(torch.bfloat16)  # the upper halves: payloads too
    x = special[None] if dtype is torch.float32 else bits[None]
    ones = torch.ones_like(x)
    for gate, up in ((x, ones), (ones, x)):
        assert torch.equal(gated_by(gate, up).isnan(), x.isnan())
    angles = (torch.full((1, 32), 0.6), torch.full((1, 32), 0.8))
    found = rotate(x, *angles, 32, dtype)[0, 0]
    turned = torch.cat([-x[0, 16:], x[0, :16]]).float() * 0.8
    assert torch.equal(found.isnan(), (x[0].float() * 0.6 + turned).isnan())
