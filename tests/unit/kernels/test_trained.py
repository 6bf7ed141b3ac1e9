"""What a graph keeps, and that the gradients of layers that keep little are those of plain ones."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, LlamaConfig, PreTrainedModel, Qwen2Config

from nvembed.kernels import functions, layers
from nvembed.kernels.functions import dropped, softmax_, softmax_backward_
from nvembed.kernels.layers import accelerate, restore
from nvembed.model.attention import FLAT_ATTENTION, flat_attention
from nvembed.model.backbone import add_lora
from nvembed.model.packing import Segments
from nvembed.model.settings import LoraSettings
from nvembed.training.model import counted_graph
from oracles.attention import attend

if not layers.available():
    pytest.skip("no compiled kernels on this machine", allow_module_level=True)

LENGTHS = (37, 20, 20, 1)
WIDTH, MLP, HEADS, KEY_HEADS, HEAD, RANK = 64, 112, 4, 2, 32, 4


def decoder(
    *, lora: bool, num_layers: int = 2, dropout: float = 0.0, family: Any = LlamaConfig
) -> PreTrainedModel:
    """A decoder that trains, all of it or adapters that do something."""
    torch.manual_seed(1)
    config = family(
        vocab_size=50,
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=num_layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        head_dim=HEAD,
    )
    holder: Any = SimpleNamespace()
    holder.model = AutoModel.from_config(config, attn_implementation=FLAT_ATTENTION)
    with torch.no_grad():
        for name, weight in holder.model.named_parameters():
            weight.add_(torch.randn_like(weight) / 4 if "norm" in name or "bias" in name else 0)
            weight.mul_(1 if "norm" in name else 4)
    accelerate(holder.model)
    if lora:
        add_lora(holder, LoraSettings(rank=RANK, alpha=8, dropout=dropout))
        for name, weight in holder.model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.2)
    made: PreTrainedModel = holder.model
    return made.train()


def hidden(model: nn.Module, half: bool, *, causal: bool = False) -> Tensor:
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        output: Any = model(
            input_ids=(torch.arange(len(positions)) * 7 % 50)[None],
            position_ids=positions[None],
            attention_mask=None,
            segments=Segments.of_lengths(LENGTHS),
            causal=causal,
            use_cache=False,
        )
    return output.last_hidden_state[0]  # type: ignore[no-any-return]


def results(model: nn.Module, half: bool, **options: bool) -> dict[str, Tensor]:
    """States, and the gradient of every parameter that has one."""
    model.zero_grad()
    torch.manual_seed(5)
    out_TD = hidden(model, half, **options)
    torch.manual_seed(6)
    (out_TD.float() * torch.randn(out_TD.shape)).sum().backward()
    found = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    return {"states": out_TD.detach().double()} | found


def errors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == wanted.keys()
    return {n: float((found[n] - wanted[n]).norm() / wanted[n].norm()) for n in found}


def plain(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    restore(other)
    return other


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("family", [LlamaConfig, Qwen2Config])
def test_values_and_gradients(
    lora: bool, causal: bool, family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    call = functions.call

    def counted(source: str, name: str, *arguments: Any) -> None:
        called.append(name)
        call(source, name, *arguments)

    model = decoder(lora=lora, family=family)
    exact = results(plain(model).double(), False, causal=causal)
    assert len(exact) >= 2 * 9
    wide = errors(results(plain(model), False, causal=causal), exact)
    narrow = errors(results(plain(model), True, causal=causal), exact)
    monkeypatch.setattr(functions, "call", counted)
    for name, error in errors(results(model, False, causal=causal), exact).items():
        assert error < max(2 * wide[name], 1e-5), name
    assert called.count("norm_again") == 2 * 2  # and the gates, on the way back
    assert called.count("gate_forward") == 2 * 2
    assert "softmax" not in called
    found = errors(results(model, True, causal=causal), exact)
    for name, error in found.items():
        assert error < max(3 * narrow[name], 0.03), name  # theirs mixes heads in float32
    assert sum(found.values()) < 2 * sum(narrow.values())
    assert called.count("softmax") == 2 * 2 * 3  # there and back, of three lengths


@pytest.mark.parametrize("half", [False, True])
def test_dropout_of_adapters_is_the_same_on_the_way_back(half: bool) -> None:
    model = decoder(lora=True, dropout=0.4)
    other = plain(model)

    class Seeded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                mask = dropped(torch.ones_like(x[0]), 0.4, int(torch.randint(2**62, ())))
            return x * mask

    for module in other.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = Seeded()
    for name, error in errors(results(model, half), results(other, half)).items():
        assert error < (0.1 if half else 1e-5), name
    undropped = results(model.eval(), half)
    assert min(errors(results(model.train(), half), undropped).values()) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dropped_numbers(dtype: torch.dtype) -> None:
    x_TI = torch.full((2000, 48), 3.0, dtype=dtype)
    out_TI = dropped(x_TI, 0.25, 2**61 + 5)
    kept_TI = out_TI != 0
    assert out_TI.unique().tolist() == [0.0, 4.0]
    assert torch.equal(out_TI, dropped(x_TI, 0.25, 2**61 + 5))
    # Four deviations of a binomial: of all, of rows and columns, of neighbours, of other seeds.
    assert kept_TI.float().mean().item() == pytest.approx(0.75, abs=0.006)
    assert kept_TI.float().mean(0).std().item() == pytest.approx((0.1875 / 2000) ** 0.5, rel=0.45)
    assert kept_TI.float().mean(1).std().item() == pytest.approx((0.1875 / 48) ** 0.5, rel=0.07)
    pairs = [(kept_TI[:, 1:], kept_TI[:, :-1]), (kept_TI[1:], kept_TI[:-1])]
    others: tuple[int, ...] = (2**61 + 6, 5, 2**61 + 5 + 2**33)
    if dtype is torch.float64:  # torch's generator, which takes 32 bits of a seed
        others = others[:1]
    pairs += [(kept_TI, dropped(x_TI, 0.25, seed) != 0) for seed in others]
    for one, other in pairs:
        assert (one & other).float().mean().item() == pytest.approx(0.5625, abs=0.0075)


@pytest.mark.parametrize("width", [1, 15, 16, 37, 1024])
@pytest.mark.parametrize("spread", [0.1, 30.0])
def test_softmax_of_rows(width: int, spread: float) -> None:
    score_RL = (torch.randn(9, width) * spread).bfloat16()
    d_weight_RL = torch.randn(9, width).bfloat16()
    exact_RL = score_RL.double().requires_grad_()
    wanted_RL = (exact_RL * 0.3).softmax(-1)
    weight_RL = softmax_(score_RL.clone(), 0.3)
    torch.testing.assert_close(weight_RL.double(), wanted_RL.detach(), atol=1e-6, rtol=0.004)
    (wanted,) = torch.autograd.grad(wanted_RL, exact_RL, d_weight_RL.double())
    found = softmax_backward_(weight_RL, d_weight_RL, 0.3).double()
    assert float((found - wanted).norm()) <= 0.01 * float(wanted.norm()) + 1e-3


@pytest.mark.parametrize("causal", [False, True])
def test_attention_of_short_texts_in_bfloat16(causal: bool) -> None:
    shapes = ((HEADS, HEAD), (KEY_HEADS, HEAD), (KEY_HEADS, HEAD))
    rows = [torch.randn(sum(LENGTHS), *shape).bfloat16() for shape in shapes]
    inputs = [x_THE.transpose(0, 1).requires_grad_() for x_THE in rows]
    exact = [x_HTE.detach().double().requires_grad_() for x_HTE in inputs]
    segments = Segments.of_lengths(LENGTHS)
    with counted_graph(nn.Identity()) as held:
        query, key, value = (x_HTE[None] for x_HTE in inputs)
        out, _ = flat_attention(
            nn.Identity(), query, key, value, None, segments=segments, causal=causal
        )
    assert sum(storage.nbytes() for storage in held.values()) == sum(x.nbytes for x in rows)
    wanted = attend(*exact, LENGTHS, HEAD**-0.5, causal=causal)
    d_out = torch.randn(wanted.shape).bfloat16()
    found = (out[0], *torch.autograd.grad(out[0], inputs, d_out))
    expected = (wanted, *torch.autograd.grad(wanted, exact, d_out.double()))
    for got, want in zip(found, expected, strict=True):
        assert got.dtype is torch.bfloat16
        assert float((got.double() - want).detach().norm() / want.detach().norm()) < 0.01


def kept_bytes(model: nn.Module, half: bool) -> float:
    """Of the graph of all tokens."""
    with counted_graph(model) as held:
        hidden(model, half)
    return sum(s.nbytes() for s in held.values())


def kept_numbers(width: int, mlp: int, heads: Sequence[int], head: int, rank: int) -> int:
    """Of a token in a layer: two norms, queries, keys and values, what they mix, gate, up, h."""
    return 2 * width + (2 * heads[0] + 2 * heads[1]) * head + 2 * mlp + 7 * rank


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_layer_keeps_what_its_gradient_needs(half: bool, dropout: float) -> None:
    options: dict[str, Any] = {"lora": True, "dropout": dropout}
    hidden(decoder(**options), half)  # kernels are tried when they are loaded
    one, two = (kept_bytes(decoder(**options, num_layers=n), half) for n in (1, 2))
    numbers = kept_numbers(WIDTH, MLP, (HEADS, KEY_HEADS), HEAD, RANK)
    size = 2 if half else 4
    # In float32 beside them: one over the root of each norm, and the logarithms of softmax.
    beside = 2 * 4 if half else 2 * 4 + HEADS * 4
    assert (two - one) / sum(LENGTHS) == numbers * size + beside
    smol = 30 * (kept_numbers(576, 1536, (9, 3), 64, 32) * 2 + 8)
    assert smol < 400e3


@pytest.mark.parametrize("half", [False, True])
def test_full_tuning_keeps_no_more_than_adapters(half: bool) -> None:
    full, adapted = (
        kept_bytes(decoder(lora=lora, num_layers=2), half)
        - kept_bytes(decoder(lora=lora, num_layers=1), half)
        for lora in (False, True)
    )
    cast = HEADS * HEAD * WIDTH * 2 if half else 0  # autocast's copy of one weight, once a step
    assert full - cast <= adapted


def test_a_watched_module_is_called() -> None:
    model: Any = decoder(lora=False)
    wanted = results(model, False)
    seen: list[str] = []
    layer = model.layers[0]
    watched = (layer.self_attn.k_proj, layer.mlp, layer.mlp.down_proj, layer.input_layernorm)
    for module in watched:
        module.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    for name, error in errors(results(model, False), wanted).items():
        assert error < 1e-5, name
    assert seen == ["LlamaRMSNorm", "Linear", "Linear", "LlamaMLP"]
