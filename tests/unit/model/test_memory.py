"""The memory forecast against tensors that are counted while they live."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, MistralConfig

from nvembed.model.attention import FLAT_ATTENTION, short_tokens
from nvembed.model.backbone import Backbone
from nvembed.model.embedder import NVEmbed
from nvembed.model.memory import Shape, activation_bytes, folded_elements, forecast, weight_bytes
from nvembed.model.packs import embed_pack
from nvembed.model.pooling import build_pooling
from nvembed.model.tokens import TokenizedText
from peak_bytes import PeakBytes


def build(tokenizer, pooling: str, **changes) -> NVEmbed:
    settings = {
        "hidden_size": 64,
        "intermediate_size": 224,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        **changes,
    }
    config = MistralConfig(vocab_size=len(tokenizer), use_cache=False, **settings)
    model = AutoModel.from_config(config, attn_implementation=FLAT_ATTENTION)
    head = build_pooling(pooling, config.hidden_size, num_latents=64, num_heads=8)
    return NVEmbed(modules=[Backbone(model, tokenizer), head], device="cpu").eval()


CASES = {
    "wide MLP": ("mean", {}),
    "narrow MLP": ("mean", {"intermediate_size": 64}),
    "wide heads": ("last", {"head_dim": 48}),
    "latent scores": ("latent", {}),
    "latent MLP": ("latent", {"hidden_size": 128, "head_dim": 32, "intermediate_size": 128}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_the_forecast_is_within_15_percent_of_what_is_counted(tiny_tokenizer, case, dtype) -> None:
    pooling, changes = CASES[case]
    model = build(tiny_tokenizer, pooling, **changes)
    model.to(dtype)
    texts = [TokenizedText(tuple(range(3, 67)), 4)] * 16
    with torch.no_grad(), model.pooling.fixed_weights(), PeakBytes() as counted:
        embed_pack(model, texts)
    latents = 64 if pooling == "latent" else 0
    shape = Shape.of_config(
        model.backbone.model.config, pooling_heads=8 if latents else 0, pooling_latents=latents
    )
    scored = min(64, short_tokens(dtype))
    expected = activation_bytes(shape, 16 * 64, dtype.itemsize, score_tokens=scored)
    assert expected == pytest.approx(counted.peak, rel=0.15), expected / counted.peak


def test_weights_are_counted_exactly(tiny_tokenizer) -> None:
    model = build(tiny_tokenizer, "latent")
    elements = sum(p.numel() for p in model.backbone.parameters())
    head = sum(p.numel() for p in model.pooling.parameters())
    assert weight_bytes(model.pooling) == {("cpu", "float32"): 4 * head}
    shape = Shape.of_config(model.backbone.model.config, pooling_heads=8, pooling_latents=64)
    folded = model.pooling.layer.fold()
    assert folded_elements(shape) == sum(x.numel() for x in folded)
    done = forecast(shape, "bfloat16", 10, elements + head, score_tokens=5)
    assert done.weights == 2 * (elements + head + folded_elements(shape))
    assert done.total == done.weights + activation_bytes(shape, 10, 2, score_tokens=5)
    model.backbone.model.to(torch.bfloat16)
    buffers = sum(b.numel() * b.element_size() for b in model.backbone.buffers())
    assert weight_bytes(model.backbone) == {("cpu", "bfloat16"): 2 * elements + buffers}
