"""Latent attention against the loop oracle; folded equals plain in value and gradients."""

from __future__ import annotations

import pytest
import torch

from nvembed.model.pooling import LatentAttention
from oracles.padded import latent_attention


def random_layer(width=12, num_latents=7, num_heads=3, head_width=None) -> LatentAttention:
    """A layer with no zero weights, so that every part matters."""
    layer = LatentAttention(width, num_latents, num_heads, head_width)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.0, 0.5)
    return layer.double()


@pytest.mark.parametrize("head_width", [None, 5])
def test_equals_the_oracle(head_width: int | None) -> None:
    layer = random_layer(head_width=head_width)
    hidden_TD = torch.randn(9, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(hidden_TD), latent_attention(layer, hidden_TD))


def test_folded_equals_plain_in_value_and_every_gradient() -> None:
    layer = random_layer()
    hidden_TD = torch.randn(9, 12, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(9, 12, dtype=torch.float64)
    used = [
        p
        for name, p in layer.named_parameters()
        if not name.startswith(("feed_forward", "norm_feed_forward"))
    ]
    results = []
    for attend in (layer.attend_plain, layer.attend_folded):
        out = attend(hidden_TD)
        results.append((out, torch.autograd.grad((out * upstream).sum(), [hidden_TD, *used])))
    (plain, plain_gradients), (folded, folded_gradients) = results
    torch.testing.assert_close(plain, folded)
    assert len(plain_gradients) == 1 + 8
    for one, other in zip(plain_gradients, folded_gradients, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other)


def test_the_cheaper_form_is_chosen_and_both_are_reachable() -> None:
    layer = LatentAttention(16, num_latents=8, num_heads=2)
    assert not layer.folding_pays(1)
    assert layer.folding_pays(10_000)


def test_weights_are_folded_once_inside_a_block_and_afresh_outside() -> None:
    layer = random_layer()
    hidden_TD = torch.randn(3, 12, dtype=torch.float64)
    with torch.no_grad():
        before = layer(hidden_TD)
        with layer.fixed_weights(fold_now=True):
            assert layer.fold() is layer.fold()
            torch.testing.assert_close(layer(hidden_TD), before)
        layer.to_query.weight.data.mul_(-1.0)
        after = layer(hidden_TD)
    assert (before - after).abs().max() > 1e-3
    torch.testing.assert_close(after, latent_attention(layer, hidden_TD))


def test_a_block_folds_once_it_has_read_enough_tokens() -> None:
    layer = random_layer()
    pays = next(count for count in range(1, 10_000) if layer.folding_pays(count))
    assert pays > 1
    hidden_TD = torch.randn(pays, 12, dtype=torch.float64)
    with torch.no_grad(), layer.fixed_weights():
        for row in range(pays):
            out_TD = layer(hidden_TD[row : row + 1])
            torch.testing.assert_close(out_TD, latent_attention(layer, hidden_TD[row : row + 1]))
            assert (layer._kept is not None) == (row + 1 == pays)
        kept = layer._kept
        layer(hidden_TD)
        assert layer._kept is kept
    assert layer._kept is None


def test_a_new_layer_returns_its_input() -> None:
    hidden_TD = torch.randn(5, 16)
    torch.testing.assert_close(LatentAttention(16, 8, 2)(hidden_TD), hidden_TD)


def test_shapes_are_those_of_the_release() -> None:
    with torch.device("meta"):
        layer = LatentAttention(4096)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes["latents_RD"] == (512, 4096)
    assert shapes["to_query.weight"] == (32768, 4096)
    assert shapes["to_key_value.weight"] == (65536, 4096)
    assert shapes["to_out.weight"] == (4096, 32768)
    assert shapes["feed_forward.up.weight"] == (32768, 4096)
    assert shapes["feed_forward.down.weight"] == (4096, 16384)
    assert (
        sum(p.numel() for p in layer.parameters()) == 740_356_096
    )  # the released layer, arXiv 2405.17428
