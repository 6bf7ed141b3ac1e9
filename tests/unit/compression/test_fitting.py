"""Layers that stay, fitted to the whole model's states: against full forwards and ``lstsq``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from families import make_family
from nvembed import NVEmbed
from nvembed.encoding.compression.compress import _packs
from nvembed.encoding.compression.fitting import fit_layers
from nvembed.encoding.compression.pruning import (
    channel_lengths,
    cut_mlps,
    decoder_layers,
    leave_out_layers,
    longest,
)
from oracles import compression as oracle

NOUNS = ["cat", "moon", "answer", "word", "lake", "hill", "star", "owl"]
TEXTS = [f"the {a} and one {b} or no {c}" for a in NOUNS for b in NOUNS for c in NOUNS[:3]]
FITTED, OTHERS = TEXTS[::2], TEXTS[1::6]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    from transformers import LlamaConfig, LlamaModel

    folder = tmp_path_factory.mktemp("five")
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.2,
        mlp_bias=True,
    )
    torch.manual_seed(0)
    model = LlamaModel(config)
    for layer in model.layers:
        torch.nn.init.normal_(layer.mlp.down_proj.bias, std=0.1)
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved: Path) -> NVEmbed:
    return NVEmbed.from_pretrained(saved, max_tokens=64)


def packs(model: NVEmbed) -> Any:
    return [pack for n in range(0, len(FITTED), 24) for pack in _packs(model, FITTED[n : n + 24])]


def downs(model: NVEmbed) -> list[np.ndarray]:
    layers: Any = decoder_layers(model)
    return [layer.mlp.down_proj.weight.detach().numpy() for layer in layers]


@pytest.mark.parametrize("dropped", [[1, 3], [0, 4], [2, 3]])
def test_layers_are_fitted_as_by_plain_least_squares(model: NVEmbed, dropped: list[int]) -> None:
    expected, errors = oracle.fit(model, packs(model), dropped)
    whole, pruned = copy.deepcopy(model), copy.deepcopy(model)
    told: list[int] = []
    found = fit_layers(model, packs(model), dropped, done=lambda: told.append(1))
    assert [row.layer for row in found] == [n for n in range(5) if n not in dropped]
    assert len(told) == 3
    np.testing.assert_allclose([row[1:] for row in found], [row[1:] for row in errors], rtol=2e-3)
    leave_out_layers(model, dropped)
    for own, other in zip(downs(model), downs(expected), strict=True):
        np.testing.assert_allclose(own, other, atol=2e-3 * np.abs(other).max())
    # It helps texts that nothing was fitted to.
    leave_out_layers(pruned, dropped)
    wanted = whole.encode(OTHERS)
    before, after = (float((m.encode(OTHERS) * wanted).sum(1).mean()) for m in (pruned, model))
    assert 1 - after < 0.6 * (1 - before), (before, after)


def test_narrower_mlps_are_fitted_as_by_plain_least_squares(model: NVEmbed) -> None:
    lengths = channel_lengths(model, packs(model))
    kept = longest(lengths, 24)
    expected, errors = oracle.fit(model, packs(model), (), kept)
    whole, plain = copy.deepcopy(model), copy.deepcopy(model)
    found = fit_layers(model, packs(model), (), kept)
    np.testing.assert_allclose([row[1:] for row in found], [row[1:] for row in errors], rtol=2e-3)
    for cut in (model, plain):
        cut_mlps(cut, lengths, 24)
    for own, other, channels in zip(downs(model), downs(expected), kept, strict=True):
        assert own.shape == (32, 24)
        other_of_kept = other[:, channels.numpy()]
        np.testing.assert_allclose(own, other_of_kept, atol=2e-3 * np.abs(other).max())
    wanted = whole.encode(OTHERS)
    before, after = (float((m.encode(OTHERS) * wanted).sum(1).mean()) for m in (plain, model))
    assert 1 - after < 0.6 * (1 - before), (before, after)


def test_where_nothing_goes_nothing_changes(model: NVEmbed) -> None:
    before = [weight.copy() for weight in downs(model)]
    found = fit_layers(model, packs(model), ())
    assert max(row.before for row in found) < 1e-9
    for own, other in zip(downs(model), before, strict=True):
        np.testing.assert_array_equal(own, other)


def test_what_cannot_be_learned_is_left(model: NVEmbed) -> None:
    # A layer's last product that sees nothing has nothing to change by.
    layers: Any = decoder_layers(model)
    layers[4].mlp.up_proj.weight.data.zero_()
    before = downs(model)[4].copy()
    found = fit_layers(model, packs(model), [2])
    assert found[-1].before == found[-1].after > 1e-3
    np.testing.assert_array_equal(downs(model)[4], before)


@pytest.mark.parametrize(
    ("family", "fits"),
    [
        ("mistral", True),
        ("qwen3", True),
        ("phi3", True),
        ("gemma2", False),
        ("gemma3_text", False),
        ("phi", False),
    ],
)
def test_families(family: str, fits: bool, tmp_path: Path, tiny_tokenizer: Any) -> None:
    model = NVEmbed.from_pretrained(make_family(family, tmp_path / "a", tiny_tokenizer))
    before = copy.deepcopy(dict(model.named_parameters()))
    found = fit_layers(model, packs(model), [0])
    changed = [
        name for name, value in model.named_parameters() if not torch.equal(value, before[name])
    ]
    assert bool(found) is fits
    assert [name.split(".")[-2:] for name in changed] == [["down_proj", "weight"]] * fits
    if fits:
        expected, _ = oracle.fit(NVEmbed.from_pretrained(tmp_path / "a"), packs(model), [0])
        leave_out_layers(model, [0])
        np.testing.assert_allclose(downs(model)[0], downs(expected)[0], atol=2e-3)


def test_weights_in_16_bits(model: NVEmbed) -> None:
    whole = model.encode(OTHERS)
    model.backbone.model.to(torch.bfloat16)
    pruned = copy.deepcopy(model)
    assert fit_layers(model, packs(model), [1, 3])
    for other in (pruned, model):
        leave_out_layers(other, [1, 3])
    before, after = (float((m.encode(OTHERS) * whole).sum(1).mean()) for m in (pruned, model))
    assert 1 - after < 0.7 * (1 - before), (before, after)
