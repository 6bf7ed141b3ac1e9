"""Adapters in fewer passes: the values and every gradient of peft's own forward."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from nvembed.kernels.functions import dropped
from nvembed.kernels.layers import accelerate, restore
from nvembed.kernels.trained import fused_lora
from nvembed.model.backbone import add_lora, hold_frozen, merge_lora
from nvembed.model.embedder import NVEmbed
from nvembed.model.packing import flatten
from nvembed.model.settings import LoraSettings


def layer(*, bias: bool, dropout: float, dtype: torch.dtype = torch.float32) -> LoraLinear:
    base = nn.Linear(12, 20, bias=bias)
    from peft import LoraConfig

    config = LoraConfig(r=3, lora_alpha=6, lora_dropout=dropout)
    made = LoraLinear(base, "default", config=config, r=3, lora_alpha=6)
    nn.init.normal_(made.lora_B["default"].weight)
    base.requires_grad_(False)
    assert accelerate(made)["fused_lora"] == 1
    return made.to(dtype)


class Seeded(nn.Dropout):
    """A dropout that draws a seed as ours does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        return x * dropped(torch.ones_like(x[0]), self.p, int(torch.randint(2**62, ())))


def results(made: nn.Module, x: torch.Tensor, autocast: bool) -> list[torch.Tensor]:
    made.zero_grad()
    leaf = x.clone().requires_grad_()
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = made(leaf)
    torch.manual_seed(6)
    out.backward(torch.randn(out.shape).to(out.dtype))
    gradients = [p.grad for p in made.parameters() if p.requires_grad]
    assert leaf.grad is not None
    assert len(gradients) == 2
    return [out, leaf.grad, *gradients]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("rows", [40, 15])  # more than the layer is wide, and fewer
def test_value_and_gradients_equal_pefts(
    rows: int, bias: bool, dropout: float, training: bool, autocast: bool
) -> None:
    made = layer(bias=bias, dropout=dropout).train(training)
    plain = copy.deepcopy(made)
    restore(plain)
    if dropout:
        plain.lora_dropout["default"] = Seeded(dropout).train(training)
    x = torch.randn(1, rows, 12)
    tolerance = 3e-2 if autocast else 1e-5
    for got, want in zip(results(made, x, autocast), results(plain, x, autocast), strict=True):
        assert got.dtype == want.dtype
        assert want.abs().max() > 0.1
        scale = want.abs().max().item()
        torch.testing.assert_close(got, want, atol=tolerance * scale, rtol=0)


def test_float64_gradients_by_differences() -> None:
    made = layer(bias=True, dropout=0.0, dtype=torch.float64)
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(made, (x,))


def test_a_backbone_computes_as_peft_would_and_merges(tiny_decoder_dir: Path) -> None:
    model = NVEmbed.from_pretrained(tiny_decoder_dir, device="cpu")
    add_lora(model.backbone, LoraSettings(rank=4, alpha=8, dropout=0.0))
    adapters = [m for m in model.backbone.model.modules() if isinstance(m, LoraLinear)]
    assert adapters
    assert all(m.forward.func is fused_lora for m in adapters)
    for module in adapters:
        nn.init.normal_(module.lora_B["default"].weight, std=0.1)
    flat = flatten(model.backbone.tokenize_texts(["some text", "other"]))
    fused = model.backbone.hidden(flat)
    plain = copy.deepcopy(model)
    restore(plain)
    torch.testing.assert_close(fused, plain.backbone.hidden(flat), atol=1e-5, rtol=1e-5)
    merge_lora(model.backbone)
    torch.testing.assert_close(model.backbone.hidden(flat), fused, atol=1e-4, rtol=1e-4)
    assert not any(isinstance(m, LoraLinear) for m in model.backbone.model.modules())


def test_frozen_weights_in_the_dtype_of_autocast_change_no_bit(tiny_decoder_dir: Path) -> None:
    model = NVEmbed.from_pretrained(tiny_decoder_dir, device="cpu")
    add_lora(model.backbone, LoraSettings(rank=4, alpha=8, dropout=0.0))
    flat = flatten(model.backbone.tokenize_texts(["some text", "other"]))
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.backbone.hidden(flat)
        hold_frozen(model.backbone, torch.bfloat16)
        assert torch.equal(model.backbone.hidden(flat), expected)
    dtypes = {n: p.dtype for n, p in model.backbone.model.named_parameters()}
    assert all(
        (dtype is torch.bfloat16) == ("base_layer" in name) for name, dtype in dtypes.items()
    )
